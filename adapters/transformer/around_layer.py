"""What a decoder layer meets in its model: a cache, masks, and who collects its outputs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from deq_phantom_plugin._plumbing.extras import require

require("transformers", "text")
from transformers import Cache, PreTrainedConfig  # noqa: E402
from transformers.cache_utils import StaticLayer  # noqa: E402
from transformers.masking_utils import (  # noqa: E402
    create_causal_mask,
    create_sliding_window_causal_mask,
    packed_sequence_mask_function,
)
from transformers.utils import output_capturing  # noqa: E402

__all__ = ["CACHE", "Collected", "Past", "layer_mask"]

# What Transformers calls the cache, in arguments and in outputs; 5.24 renamed it.
CACHE = (
    "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
)


class Past:
    """A cache as a solve sees it: in place of the cache, in the arguments of one layer.

    Each evaluation of F adds its own keys and values to those that were there before the solve, and
    leaves the cache alone: evaluations in backward too, when the model has gone on.

    Args:
        cache: the model's.
        index: of the layer in it.
    """

    def __init__(self, cache: Cache, index: int) -> None:
        self._cache, self._index, self._writes = cache, index, False
        self._before = self._apart(cache)

    @property
    def length(self) -> Any:
        """How many tokens are in it; of a static one a tensor."""
        return self._before.get_seq_length(self._index)

    @property
    def is_static(self) -> bool:
        """Whether its tensors have their final length from the start."""
        layers = self._before.layers[self._index : self._index + 1]
        return any(isinstance(layer, StaticLayer) for layer in layers)

    def alone(self) -> Cache:
        """Return a cache that has no other layer: those before this one have got new tokens."""
        alone = copy.copy(self._before)
        alone.layers = self._before.layers[self._index : self._index + 1]
        return alone

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return keys and values of all tokens."""
        cache = self._cache if self._writes else self._apart(self._before)
        return cache.update(*args, **kwargs)

    @staticmethod
    @contextmanager
    def written(past: Past | None) -> Iterator[None]:
        """Let evaluations of F write to the cache inside a `with` block."""
        if past is not None:
            past._writes = True
        try:
            yield
        finally:
            if past is not None:
                past._writes = False

    def _apart(self, cache: Cache) -> Cache:
        """Return a copy whose update changes nothing of the cache."""
        apart = copy.copy(cache)
        apart.layers = list(cache.layers)
        if self._index < len(apart.layers):
            layer = apart.layers[self._index] = copy.copy(apart.layers[self._index])
            if isinstance(layer, StaticLayer):  # which writes in place
                for name, value in vars(layer).items():
                    if isinstance(value, Tensor):
                        setattr(layer, name, value.clone())
        return apart

    def __getattr__(self, name: str) -> Any:
        """Whatever else a layer asks of its cache."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._cache, name)


def layer_mask(
    config: PreTrainedConfig,
    window: int | None,
    x: Tensor,
    attention_mask: Any,
    position_ids: Tensor,
    past: Past | None,
) -> tuple[Any, Tensor | None]:
    """Return the mask as the layer takes it, and where states are not those of padding.

    A query that sees no key is shown all of them: what a kernel makes of no key may be NaN, and
    that times zero is NaN in the backward pass. Its state is zero in any case.

    Args:
        config: of the layer.
        window: how many tokens a token sees, None for all before it.
        x: the injection, shape (B, L, hidden_size).
        attention_mask: None, of two dimensions, or prepared.
        position_ids: shape (1 or B, L).
        past: the cache.

    Returns:
        The mask, and None or shape (B, L, 1).

    Raises:
        ValueError: if the mask does not fit.
    """
    batch, length = x.shape[:2]
    real: Tensor | None = None
    if attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.dim() == 2):
        if attention_mask is not None:
            attention_mask, real = _tokens(attention_mask, x, past)
        mask = _causal_mask(config, window, x, attention_mask, position_ids, past)
    else:
        mask = attention_mask
        _check_prepared(mask, config, batch, length, past)
        if isinstance(mask, Tensor) and mask.is_floating_point():
            mask = _added(mask, x.dtype)
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return mask, real  # as FlashAttention and FlexAttention take them
    if mask.dtype == torch.bool and config._attn_implementation == "eager":
        hidden = torch.finfo(x.dtype).min  # where it would be added as 0 and 1
        mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, hidden)
    if mask.dtype == torch.bool:
        sees = mask.any(-1, keepdim=True)
        mask = mask | ~sees
    else:
        sees = (mask > torch.finfo(mask.dtype).min).any(-1, keepdim=True)
        mask = mask.masked_fill(~sees, 0)
    seeing = sees.any(1).expand(batch, -1, -1)
    return mask, seeing if real is None else seeing & real


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask that is added to the scores, in their dtype."""
    if bool(((mask == 0) | (mask == 1)).all()) and bool(mask.any()):
        raise ValueError(
            "an attention_mask of zeros and ones in floating numbers, which are added to the "
            "scores; expected bool, or a very negative number where nothing may be seen"
        )
    hidden = mask <= torch.finfo(mask.dtype).min
    return mask.to(dtype).masked_fill(hidden, torch.finfo(dtype).min)


def _tokens(mask: Tensor, x: Tensor, past: Past | None) -> tuple[Tensor | None, Tensor | None]:
    """Return a mask of two dimensions, None if it hides nothing, and where new tokens are."""
    batch, length = x.shape[:2]
    before = 0 if past is None else int(past.length)
    # A static cache may be given a mask of its whole length.
    fits = mask.shape[1] == before + length or (past is not None and past.is_static)
    if mask.shape[0] != batch or not fits:
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)}; expected ({batch}, {before + length}), "
            "one number a token, or a prepared one of four dimensions"
        )
    if bool(mask.all()):
        return None, None
    return mask, mask[:, before : before + length, None] > 0


def _check_prepared(
    mask: Any, config: PreTrainedConfig, batch: int, length: int, past: Past | None
) -> None:
    heads = config.num_attention_heads
    shape = tuple(mask.shape)
    fits = len(shape) == 4 and shape[0] in (1, batch) and shape[1] in (1, heads)
    fits = fits and (not isinstance(mask, Tensor) or shape[2] == length)
    fits = fits and (past is not None or not isinstance(mask, Tensor) or shape[3] == length)
    if not fits:
        raise ValueError(
            f"attention_mask of shape {shape}; expected two dimensions, (batch, length), or four: "
            f"(1 or {batch}, 1 or {heads}, {length}, keys)"
        )
    if isinstance(mask, Tensor) and not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(
            f"attention_mask of four dimensions and {mask.dtype}; expected bool, or numbers that "
            "are added to the scores"
        )


def _causal_mask(
    config: PreTrainedConfig,
    window: int | None,
    x: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor,
    past: Past | None,
) -> Any:
    """Return the mask that Transformers makes, documents told apart."""
    fresh = past is None or (not past.is_static and past.length == 0)
    make = create_causal_mask if window is None else create_sliding_window_causal_mask
    settings: dict[str, Any] = {}
    if fresh and attention_mask is not None:
        # Transformers looks at positions only where it has no mask.
        documents = _documents(position_ids, attention_mask)
        if documents is not None:
            if "flash" in (config._attn_implementation or ""):
                raise ValueError(
                    "attention_mask with padding and position_ids that restart, which "
                    "FlashAttention does not take together; expected one of them"
                )
            settings["and_mask_function"] = packed_sequence_mask_function(documents)
    return make(
        config=config,
        inputs_embeds=x,
        attention_mask=attention_mask,
        position_ids=position_ids,
        **{CACHE: None if fresh or past is None else past.alone()},
        **settings,
    )


def _documents(position_ids: Tensor, attention_mask: Tensor) -> Tensor | None:
    """Number the documents that a row of tokens holds, None if none holds several.

    One begins where positions do not go on from those of the last token before or, after padding,
    from those that the padding has, as in generation.
    """
    real = attention_mask > 0
    positions = position_ids.expand(real.shape)
    index = torch.arange(real.shape[1], device=real.device)
    last = index.where(real, -1).cummax(-1).values[:, :-1]
    before, here = positions.gather(1, last.clamp_min(0)), positions[:, 1:]
    after = (here <= before) & ((here <= positions[:, :-1]) | (here == 0))
    restarts = torch.where(last == index[:-1], here != before + 1, after)
    restarts = restarts & real[:, 1:] & (last >= 0)
    if not bool(restarts.any()):
        return None
    return torch.nn.functional.pad(restarts.long().cumsum(-1), (1, 0))


class Collected:
    """What a model collects of its layers' outputs, by hooks that see each evaluation of F."""

    def __init__(self) -> None:
        found = output_capturing._active_collector.get() or {}
        self._lists = {key: value for key, value in found.items() if isinstance(value, list)}
        self._selected = found.get("_hidden_states_layers")
        self._lengths = {key: len(value) for key, value in self._lists.items()}

    def wants(self, key: str) -> bool:
        """Whether outputs of a kind are collected."""
        return key in self._lists

    def forget(self, *keys: str) -> None:
        """Take away what was collected since this was made, of some kinds or all."""
        for key in keys or self._lists:
            del self._lists[key][self._lengths[key] :]

    def states(self, first: Tensor, output: Tensor) -> None:
        """Collect the output of this layer, and what went into it if it is the first."""
        if not self.wants("hidden_states"):
            return
        self.forget("hidden_states")
        states = self._lists["hidden_states"]
        for state in [output] if states else [first, output]:
            chosen = self._selected is None or len(states) in self._selected
            states.append(state if chosen else None)
