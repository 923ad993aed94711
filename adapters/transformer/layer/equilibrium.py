"""A decoder layer as an equilibrium."""

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

from ..solve import EquilibriumInfo, make_equilibrium, solvable, solve
from ..versions import CACHE
from .around import Collected, Past
from .masks import layer_mask

__all__ = ["EquilibriumLayer", "deq_from_layer"]


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


# Longer than 60 lines: two in three are its arguments, and what is said of them.
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
        llama.model.layers[0] = block  # works in the model that it came from, `generate` included

    Limits: decoder layers of GPT-2, Llama, Mistral, Qwen2 and Qwen3, without cross-attention.
    Nothing makes the equilibrium of a layer from a trained stack exist: look at
    `block.last.residual`, and train it as an equilibrium.

    Args:
        layer: the layer, taken over with its parameters; pass a deep copy to keep it apart.
        model_type: its `config.model_type`; found in the layer if None.
        grad: the gradient of the equilibrium, a spec of `dpp.get_strategy`; `dpp.set_grad` changes
            it later.
        f_solver: TorchDEQ's name of the forward solver.
        f_max_iter: the most iterations of the forward solve.
        f_tol: its relative residual of each sample.
        grad_in_eval: whether the gradient is attached in evaluation mode too.
        compile: whether F is compiled for the solve and for gradients that go through its graph
            once, or a mode of `torch.compile`, see docs/howto/compile.md.
        solve_dtype: "bfloat16" or "float16" to take most of the forward solve in it; needs an
            `f_solver` of this package, such as "anderson_fast". See docs/howto/solvers.md.

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

    The normalisation has no weights. Without it the residual stream of the layer would have an
    equilibrium only where all its parts add up to zero. Dropout inside the layer draws the same
    masks at every evaluation of a solve.

    It takes what the model around gives to the layer, returns what that returns, and passes for it
    where the model reads its attributes. A token's equilibrium does not depend on later tokens. So
    a cache gets the keys and values of the equilibrium, once a solve, and with those of earlier
    tokens in it only the new ones are solved for.

    Args:
        layer: the decoder layer.
        config: its config.
        rotary: makes the positions it takes, None for none.
        deq: of `solve.make_equilibrium`.
        compile: see `deq_from_layer`.

    Attributes:
        last: residual and evaluations of the last forward solve, None before the first.
    """

    compiles: bool | str = False  # in pickles from before it is missing

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
            *args: `attention_mask` and `position_ids`; or what the layer takes, in its own order.
            **kwargs: the same by name. All but these go to the layer as they are:

                - `attention_mask`: 1 for tokens and 0 for padding, whose states are zero, shape
                  (B, P + L) with P tokens in the cache; or prepared for the layer, shape
                  (1 or B, 1 or heads, L, keys), where states of queries that see no key are zero;
                - `position_ids`: shape (1 or B, L); counted from P if None. Where they restart, and
                  the mask is none of four dimensions, documents do not see one another;
                - `position_embeddings`: cos and sin of the positions; made here if None;
                - `cache` (`past_key_values` before Transformers 5.24): gets the keys and values.

        Raises:
            ValueError: if a shape does not fit; on cross-attention.
        """
        func, past = self._problem(hidden_states, args, kwargs)
        collected = Collected()
        state, self.last = solve(self.deq, func, hidden_states)
        collected.forget()
        if past is not None or collected.wants("attentions"):
            # Once more at the equilibrium, for what the layer leaves behind.
            with Past.written(past):
                func(state)
        output = state.to(hidden_states.dtype)
        collected.states(hidden_states, output)
        return output

    def equilibrium_func(
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Callable[[Tensor], Tensor]:
        """Return the map whose equilibrium this is; for the arguments see `forward`."""
        return self._problem(hidden_states, args, kwargs)[0]

    def _problem(
        self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Callable[[Tensor], Tensor], Past | None]:
        """Return the map, and the cache as it sees that."""
        if x.dim() != 3 or x.shape[-1] != self.config.hidden_size or 0 in x.shape:
            raise ValueError(
                f"hidden_states of shape {tuple(x.shape)}; expected (batch, length, "
                f"{self.config.hidden_size}) with at least one token"
            )
        settings = self._named(args, kwargs)
        if settings.get("encoder_hidden_states") is not None:
            raise ValueError("encoder_hidden_states; an equilibrium block has no cross-attention")
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
        x = x if real is None else x.where(real, 0)  # what padding holds does not matter
        if self.rotary is not None and settings.get("position_embeddings") is None:
            settings["position_embeddings"] = self.rotary(x, positions)

        def func(state: Tensor) -> Tensor:
            image: Tensor = self.norm(self.layer(state + x, **settings))
            return image

        # A cache's length changes with every token.
        compile = self.compiles if past is None else False
        return solvable(func, x.dtype, real, compile, self), past

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of the layer by their names."""
        names = self._names
        if names[0] == CACHE and len(args) < 3 and not isinstance(next(iter(args), None), Cache):
            names = ["attention_mask", "position_ids"]  # GPT-2's model gives three
        settings = {**dict(zip(names, args, strict=False)), **kwargs}
        given = [settings.pop(name, None) for name in ("past_key_values", "cache")]
        settings[CACHE] = next((cache for cache in given if cache is not None), None)
        return {"attention_mask": None, "position_ids": None, **settings}

    @property
    def _attention(self) -> Any:
        """The layer's self-attention."""
        return next(module for module in self.layer.modules() if hasattr(module, "layer_idx"))

    @property
    def _window(self) -> int | None:
        """How many tokens a token sees, None for all before it."""
        own = getattr(self.config, "sliding_window", None)
        window: int | None = getattr(self._attention, "sliding_window", own)
        return window

    def __getattr__(self, name: str) -> Any:
        """Models read attributes of their layers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "layer" or name.startswith("__"):
                raise
            return getattr(super().__getattr__("layer"), name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": None}
