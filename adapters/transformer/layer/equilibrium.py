"""`deq_from_layer`, which turns a decoder layer of Transformers into an equilibrium block.

`EquilibriumLayer` is that block. It can take the place of the layer in its model: it accepts the
same arguments, writes the equilibrium's keys and values to the cache, and returns the same type.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache, PreTrainedConfig

from deq_phantom_plugin._plumbing.compilation import check_compile
from deq_phantom_plugin.hosts.collected import Collected

from ..solve import EquilibriumInfo, make_equilibrium, solvable, solve
from ..versions import CACHE
from .around import Past
from .masks import layer_mask

__all__ = ["EquilibriumLayer", "deq_from_layer"]


def _rotary(layer: nn.Module, config: PreTrainedConfig) -> nn.Module:
    """Return the rotary embedding from the module in which the layer is defined."""
    module = importlib.import_module(type(layer).__module__)
    name = type(layer).__name__.replace("DecoderLayer", "RotaryEmbedding")
    embedding: nn.Module = getattr(module, name)(config)
    return embedding


def _no_positions(layer: nn.Module, config: PreTrainedConfig) -> None:
    """Return None: the embeddings of such a model contain the positions."""


# Model type -> what computes the positions that its decoder layers need.
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


# Longer than 60 lines: most of them are its arguments and their docstring.
def deq_from_layer(
    layer: nn.Module,
    model_type: str | None = None,
    *,
    grad: Any = "upg",
    f_solver: str = "anderson",
    f_max_iter: int = 30,
    f_tol: float = 1e-3,
    grad_in_eval: bool = False,
    compile: bool | str = False,
    solve_dtype: str | None = None,
) -> EquilibriumLayer:
    """Turn a Transformers decoder layer into an equilibrium block.

        block = deq_from_layer(llama.model.layers[0], grad="npg(k=9)")
        states = block(embeddings, attention_mask)
        llama.model.layers[0] = block  # the block works in its model, also in `generate`

    Decoder layers of GPT-2, Llama, Mistral, Qwen2 and Qwen3 are supported, without cross-attention.
    A layer from a trained stack need not have an equilibrium. Look at `block.last.residual`, and
    train the block as an equilibrium.

    Args:
        layer: the layer. The block uses its parameters; pass a deep copy to keep them apart.
        model_type: the `config.model_type` of the layer; if None, it is read from the layer.
        grad: the gradient of the equilibrium, a spec of `dpp.get_strategy`; `dpp.set_grad` changes
            it later.
        f_solver: TorchDEQ's name of the forward solver.
        f_max_iter: the largest number of iterations of the forward solve.
        f_tol: the relative residual at which the solve of a sample stops.
        grad_in_eval: whether the gradient is attached in evaluation mode too.
        compile: whether F is compiled for the solve, and for gradients that go through its graph
            once; or a mode of `torch.compile`, see docs/howto/compile.md.
        solve_dtype: "bfloat16" or "float16" to compute most of the forward solve in this dtype. It
            needs an `f_solver` of this package, such as "anderson_fast". See docs/howto/solvers.md.

    Returns:
        The block.

    Raises:
        ValueError: if layers of this type are not supported, with a list of those that are; or if a
            setting is out of range.
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
        raise ValueError(f"no equilibrium block for layers of {kind!r}; expected one of {known}")
    if "DecoderLayer" not in type(layer).__name__ and type(layer).__name__ != "GPT2Block":
        raise ValueError(
            f"{type(layer).__name__} is not a decoder layer of {kind}; expected a whole layer of "
            "the model, such as model.model.layers[0] or model.transformer.h[0]"
        )
    if config._attn_implementation is None:
        config._attn_implementation = "sdpa"
    return EquilibriumLayer(
        layer,
        config,
        _POSITIONS[kind](layer, config),
        make_equilibrium(grad, f_solver, f_max_iter, f_tol, solve_dtype, grad_in_eval),
        compile,
    )


class EquilibriumLayer(nn.Module):
    """The equilibrium h = norm(layer(h + x)) of a decoder layer, for an injection x.

    The normalisation has no weights. Without it, the residual stream of the layer would have an
    equilibrium only where all its parts add up to zero. Dropout inside the layer draws the same
    masks in every evaluation of a solve.

    The block accepts the arguments of the layer and returns what the layer returns. It also
    forwards attributes, which the model around may read. The equilibrium of a token does not depend
    on later tokens. So a cache gets the keys and values of the equilibrium once per solve. With a
    cache, only the new tokens are solved for.

    Args:
        layer: the decoder layer.
        config: the config of the layer.
        rotary: computes the positions that the layer needs; None if it needs none.
        deq: TorchDEQ's module, from `solve.make_equilibrium`.
        compile: see `deq_from_layer`.

    Attributes:
        last: the residual and the evaluations of the last forward solve, None before the first.
    """

    compiles: bool | str = False  # older pickles do not have this attribute

    def __init__(
        self,
        layer: nn.Module,
        config: PreTrainedConfig,
        rotary: nn.Module | None,
        deq: nn.Module,
        compile: bool | str = False,
    ) -> None:
        super().__init__()
        self.config, self.layer, self.rotary, self.deq = config, layer, rotary, deq
        self.compiles = check_compile(compile)  # `compile` is a method of modules
        self.norm = nn.LayerNorm(config.hidden_size, elementwise_affine=False)
        self._names = list(inspect.signature(type(layer).forward).parameters)[2:]
        self.last: EquilibriumInfo | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the equilibrium, shape (B, L, hidden_size).

        Args:
            hidden_states: the injection x, shape (B, L, hidden_size).
            *args: `attention_mask` and `position_ids`; or the arguments of the layer, in its order.
            **kwargs: the same arguments by name. These are read here, and all others go to the
                layer unchanged:

                - `attention_mask`: 1 for tokens and 0 for padding, shape (B, P + L) with P tokens
                  in the cache. The states of padding are zero. Or a mask that is prepared for the
                  layer, shape (1 or B, 1 or heads, L, keys). The states of queries that attend to
                  no key are then zero.
                - `position_ids`: shape (1 or B, L); counted from P if None. A document begins where
                  they restart, and documents do not attend to one another, unless the mask is a
                  prepared one.
                - `position_embeddings`: cos and sin of the positions; computed here if None.
                - `cache` (`past_key_values` before Transformers 5.24): gets the keys and values.

        Raises:
            ValueError: if a shape does not fit, or if there is cross-attention.
        """
        func, past = self._problem(hidden_states, args, kwargs)
        collected = Collected()
        state, self.last = solve(self.deq, func, hidden_states)
        collected.forget()
        if past is not None or collected.wants("attentions"):
            # One more evaluation at the equilibrium fills the cache and the collected attentions.
            with Past.written(past):
                func(state)
        output = state.to(hidden_states.dtype)
        collected.states(hidden_states, output)
        return output

    def equilibrium_func(
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Callable[[Tensor], Tensor]:
        """Return F, the map whose equilibrium this block returns; for arguments see `forward`."""
        return self._problem(hidden_states, args, kwargs)[0]

    def _problem(
        self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Callable[[Tensor], Tensor], Past | None]:
        """Return F, and the stand-in for the cache in its arguments."""
        if x.dim() != 3 or x.shape[-1] != self.config.hidden_size or 0 in x.shape:
            raise ValueError(
                f"hidden_states of shape {tuple(x.shape)}; expected (batch, length, "
                f"{self.config.hidden_size}) with at least one token"
            )
        settings = self._named(args, kwargs)
        if settings.get("encoder_hidden_states") is not None:
            raise ValueError(
                "encoder_hidden_states; expected None, since an equilibrium block has no "
                "cross-attention"
            )
        cache = settings[CACHE]
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        past = None if cache is None else Past(cache, self._attention.layer_idx)
        settings[CACHE] = past
        positions = settings["position_ids"]
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
            positions = positions if past is None else positions + past.length
            settings["position_ids"] = positions
        mask, real = layer_mask(
            self.config, self._window, x, settings["attention_mask"], positions, past
        )
        settings["attention_mask"] = mask
        x = x if real is None else x.where(real, 0)  # the values of padding must not matter
        if self.rotary is not None and settings.get("position_embeddings") is None:
            settings["position_embeddings"] = self.rotary(x, positions)

        def func(state: Tensor) -> Tensor:
            image: Tensor = self.norm(self.layer(state + x, **settings))
            return image

        # With a cache, each new length would be compiled again.
        compile = self.compiles if past is None else False
        return solvable(func, x.dtype, real, compile, self), past

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of the layer by their names."""
        names = self._names
        if names[0] == CACHE and len(args) < 3 and not isinstance(next(iter(args), None), Cache):
            # GPT-2's model passes three arguments by position. With fewer, they are these.
            names = ["attention_mask", "position_ids"]
        settings = {**dict(zip(names, args, strict=False)), **kwargs}
        given = [settings.pop(name, None) for name in ("past_key_values", "cache")]
        settings[CACHE] = next((cache for cache in given if cache is not None), None)
        return {"attention_mask": None, "position_ids": None, **settings}

    @property
    def _attention(self) -> Any:
        """The self-attention module of the layer."""
        return next(module for module in self.layer.modules() if hasattr(module, "layer_idx"))

    @property
    def _window(self) -> int | None:
        """The number of tokens to which a token attends; None for all tokens before it."""
        own = getattr(self.config, "sliding_window", None)
        window: int | None = getattr(self._attention, "sliding_window", own)
        return window

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the layer, since models read attributes of their layers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "layer" or name.startswith("__"):
                raise
            return getattr(super().__getattr__("layer"), name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": None}
