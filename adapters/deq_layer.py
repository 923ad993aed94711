"""Equilibrium blocks out of Transformers' own decoder layers."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from deq_phantom_plugin.draws import SameDraws
from deq_phantom_plugin.extras import require

from .equilibrium import EquilibriumInfo, make_equilibrium, solve

require("transformers.modeling_utils", "text")
from transformers import PreTrainedConfig  # noqa: E402
from transformers.masking_utils import create_causal_mask  # noqa: E402

__all__ = ["EquilibriumLayer", "deq_from_layer"]

# What Transformers calls the cache, in arguments and in outputs; 5.24 renamed it.
CACHE = (
    "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
)


def _rotary(layer: nn.Module, config: PreTrainedConfig) -> nn.Module:
    """Return the rotary embedding that the layer's own file has."""
    module = importlib.import_module(type(layer).__module__)
    name = type(layer).__name__.replace("DecoderLayer", "RotaryEmbedding")
    embedding: nn.Module = getattr(module, name)(config)
    return embedding


def _no_positions(layer: nn.Module, config: PreTrainedConfig) -> None:
    """Return nothing: positions are in the embeddings."""


# Model type -> what makes the positions that its decoder layers take.
_POSITIONS: Mapping[str, Callable[[nn.Module, PreTrainedConfig], nn.Module | None]] = (
    MappingProxyType(
        {
            "gpt2": _no_positions,
            "llama": _rotary,
            "mistral": _rotary,
            "qwen2": _rotary,
            "qwen3": _rotary,
        }
    )
)


def deq_from_layer(
    layer: nn.Module,
    model_type: str | None = None,
    *,
    grad: Any = "upg",
    f_solver: str = "anderson",
    f_max_iter: int = 30,
    f_tol: float = 1e-3,
) -> EquilibriumLayer:
    """Turn a Transformers decoder layer into an equilibrium block.

        block = deq_from_layer(llama.model.layers[0], grad="npg(k=9)")
        states = block(embeddings, attention_mask)

    Limits: decoder layers of GPT-2, Llama, Mistral, Qwen2 and Qwen3; full attention only, no
    sliding window; no cache and no cross-attention. Nothing makes the equilibrium of a layer from a
    trained stack exist: look at `block.last.residual`, and train it as an equilibrium.

    Args:
        layer: the layer, taken over with its parameters; pass a deep copy to keep it apart.
        model_type: its `config.model_type`; found in the layer if None.
        grad: the gradient of the equilibrium, a spec of `dpp.get_strategy`; `dpp.set_grad` changes
            it later.
        f_solver: TorchDEQ's name of the forward solver.
        f_max_iter: the most iterations of the forward solve.
        f_tol: its relative residual of each sample.

    Raises:
        ValueError: if layers of this type are unknown, with a list of those that are not; or on a
            setting out of range.
    """
    configs = (vars(m).get("config") for m in layer.modules())
    config = next((c for c in configs if isinstance(c, PreTrainedConfig)), None)
    known = ", ".join(_POSITIONS)
    if config is None:
        raise ValueError(
            f"{type(layer).__name__} holds no Transformers config; expected a decoder layer of "
            f"{known}"
        )
    kind = config.model_type if model_type is None else model_type
    if kind not in _POSITIONS:
        raise ValueError(f"no equilibrium block for layers of {kind!r}; there is one for {known}")
    if "DecoderLayer" not in type(layer).__name__ and type(layer).__name__ != "GPT2Block":
        raise ValueError(f"{type(layer).__name__} is not a decoder layer of {kind}")
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(layer, "attention_type", "") != "full_attention":
        raise ValueError(
            f"the layer attends to a sliding window of {window} tokens; expected full attention: "
            "config.sliding_window = None"
        )
    if config._attn_implementation is None:
        config._attn_implementation = "sdpa"
    return EquilibriumLayer(
        layer,
        config,
        _POSITIONS[kind](layer, config),
        make_equilibrium(grad, f_solver, f_max_iter, f_tol),
    )


class EquilibriumLayer(nn.Module):
    """The equilibrium h = norm(layer(h + x)) of a decoder layer, for an injection x.

    The normalisation has no weights. Without it the residual stream of the layer would have an
    equilibrium only where all its parts add up to zero. Dropout inside the layer draws the same
    masks at every evaluation of a solve.

    Args:
        layer: the decoder layer.
        config: its config.
        rotary: makes the positions it takes, None for none.
        deq: of `equilibrium.make_equilibrium`.

    Attributes:
        last: residual and evaluations of the last forward solve, None before the first.
    """

    def __init__(
        self, layer: nn.Module, config: PreTrainedConfig, rotary: nn.Module | None, deq: nn.Module
    ) -> None:
        super().__init__()
        self.config, self.layer, self.rotary, self.deq = config, layer, rotary, deq
        self.norm = nn.LayerNorm(config.hidden_size, elementwise_affine=False)
        self.last: EquilibriumInfo | None = None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the equilibrium, shape (B, L, hidden_size).

        Args:
            hidden_states: the injection x, shape (B, L, hidden_size).
            attention_mask: 1 for tokens and 0 for padding, whose states are zero; shape (B, L).
            position_ids: shape (B, L); counted from 0 if None.
        """
        func = self.equilibrium_func(hidden_states, attention_mask, position_ids)
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        state, self.last = solve(self.deq, func, torch.zeros_like(hidden_states, dtype=dtype))
        return state.to(hidden_states.dtype)

    def equilibrium_func(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Callable[[Tensor], Tensor]:
        """Return the map whose equilibrium this is; for the arguments see `forward`."""
        x = hidden_states
        if x.dim() != 3 or x.shape[-1] != self.config.hidden_size or 0 in x.shape:
            raise ValueError(
                f"hidden_states of shape {tuple(x.shape)}; expected (batch, length, "
                f"{self.config.hidden_size}) with at least one token"
            )
        if position_ids is None:
            position_ids = torch.arange(x.shape[1], device=x.device)[None]
        settings: dict[str, Any] = {
            "attention_mask": create_causal_mask(
                config=self.config,
                inputs_embeds=x,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE: None},
            )
        }
        if self.rotary is not None:
            settings["position_embeddings"] = self.rotary(x, position_ids)

        def func(state: Tensor) -> Tensor:
            image = self.norm(self.layer(state.to(x.dtype) + x, **settings)).to(state.dtype)
            return (
                image if attention_mask is None else image.where(attention_mask[..., None] > 0, 0)
            )

        return SameDraws(func)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": None}
