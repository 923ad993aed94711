"""What the model around a layer keeps of it: a cache, and outputs that it collects."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import StaticLayer
from transformers.utils import output_capturing

__all__ = ["Collected", "Past"]


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
