"""The base class of both models: it initialises weights, saves models and switches the gradient."""

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
    """The base class of `DEQTransformerModel` and `DEQTransformerForCausalLM`."""

    config: DEQTransformerConfig
    config_class = DEQTransformerConfig
    base_model_prefix = "model"
    # The FSDP of Accelerate and of a Trainer shards each module that is named here by itself. The
    # block must not be sharded by itself: a solve would gather its weights in each evaluation, and
    # would wait for processes that need fewer evaluations.
    _no_split_modules = []  # noqa: RUF012
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True
    # The training step is in the `state_dict`, but it is not a weight. So `from_pretrained` must
    # not report it as missing or unexpected.
    _keys_to_ignore_on_load_unexpected = [r"grad_memory"]  # noqa: RUF012
    _keys_to_ignore_on_load_missing = [r"grad_memory"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ScaledLinear):
            # Unlike PyTorch's function, this one does not change weights that were loaded.
            initialization.normal_(module.weight, std=module.gain * module.in_features**-0.5)

    def set_grad(self, spec: Any) -> None:
        """Switch the gradient of the equilibrium, and write it into the config.

        Args:
            spec: see `dpp.get_strategy`. `dpp.set_grad` also takes a function, which a config
                cannot save.

        Raises:
            ValueError: if the spec is invalid; in that case nothing is switched.
        """
        strategy = dpp.get_strategy(spec)
        text = written(strategy)
        if text is None:
            raise ValueError(f"{spec!r} cannot be written in a config; dpp.set_grad takes it")
        self._base().follow_config()  # a strategy may fit the solver that it names
        dpp.set_grad(self, strategy)
        self.config.grad = text
        self._base()._followed["writes"] = self.config.writes("grad")

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save weights and config, with the gradient in force, which `dpp.set_grad` may have set.

        Args:
            *args: see Transformers' method.
            **kwargs: see Transformers' method.
        """
        base, config = self._base(), self.config
        base.follow_config()
        before = {"grad": config.grad, "grad_in_eval": config.grad_in_eval}
        # Other models may share the config, and must not follow what is written here.
        config.write_uncounted(grad=base.acting_grad(), grad_in_eval=bool(base.deq.grad_in_eval))
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            config.write_uncounted(**before)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Refuse gradient checkpointing, which Transformers has for stacks of layers.

        Raises:
            ValueError: always; the message says what to do instead.
        """
        raise ValueError(
            "gradient checkpointing is for stacks of layers, and this model has one block. An "
            "equilibrium keeps no graph of its solve. npg, jfb and ift keep the graph of one "
            "evaluation, and so does upg after model.set_grad('upg(checkpoint=True)')"
        )

    def _base(self) -> Any:
        """Return the `DEQTransformerModel` that has the equilibrium: this model, or its part."""
        return getattr(self, self.base_model_prefix, self)
