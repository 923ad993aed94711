"""What both models share: how they are initialised, saved, and given a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, initialization

import deq_phantom_plugin as dpp

from .block import ScaledLinear
from .config import DEQTransformerConfig, written

__all__ = ["DEQTransformerPreTrainedModel"]


class DEQTransformerPreTrainedModel(PreTrainedModel):
    """What both models share."""

    config: DEQTransformerConfig
    config_class = DEQTransformerConfig
    base_model_prefix = "model"
    # FSDP of Accelerate and of a Trainer shards apart what is named here. Not so the block: a solve
    # would gather its weights in each evaluation, and wait for processes that need fewer.
    _no_split_modules = []  # noqa: RUF012
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True
    # The step of training is no weight; `load_state_dict` takes it, and so does a Trainer.
    _keys_to_ignore_on_load_unexpected = [r"grad_memory"]  # noqa: RUF012
    _keys_to_ignore_on_load_missing = [r"grad_memory"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ScaledLinear):
            # Unlike PyTorch's, this leaves weights alone that were loaded.
            initialization.normal_(module.weight, std=module.gain * module.in_features**-0.5)

    def set_grad(self, spec: Any) -> None:
        """Switch the gradient of the equilibrium, and let the config say so.

        Args:
            spec: see `dpp.get_strategy`. `dpp.set_grad` also takes a function, which a config could
                not save.

        Raises:
            ValueError: if the spec is invalid; then nothing is switched.
        """
        strategy = dpp.get_strategy(spec)
        text = written(strategy)
        if text is None:
            raise ValueError(f"{spec!r} cannot be written in a config; dpp.set_grad takes it")
        dpp.set_grad(self, strategy)
        self.config.grad = text
        self._base()._followed["writes"] = self.config.writes

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save weights and config, with the gradient that acts: `dpp.set_grad` may have set it.

        See Transformers' method for the arguments.
        """
        base, config = self._base(), self.config
        base.follow_config()
        before = config.grad, config.grad_in_eval
        config.grad, config.grad_in_eval = base.acting_grad(), bool(base.deq.grad_in_eval)
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            config.grad, config.grad_in_eval = before
            base._followed["writes"] = config.writes

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what Transformers does for stacks of layers.

        Raises:
            ValueError: says what to do instead.
        """
        raise ValueError(
            "gradient checkpointing is for stacks of layers; an equilibrium keeps no graph of its "
            "solve. npg, jfb and ift keep that of one evaluation, and so does "
            "model.set_grad('upg(checkpoint=True)')"
        )

    def _base(self) -> Any:
        """The `DEQTransformerModel` that has the equilibrium: this one, or the one inside."""
        return getattr(self, self.base_model_prefix, self)
