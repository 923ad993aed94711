"""What the model around an equilibrium layer keeps of it: a cache.

A solve evaluates the layer many times, but the model must see one layer with one result. `Past`
keeps the evaluations from writing to the cache. `hosts.collected` removes their collected outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import StaticLayer

__all__ = ["Past"]


class Past:
    """Stands in for a cache in the arguments of one layer during a solve.

    Each evaluation of F appends its own keys and values to those from before the solve, and does
    not change the cache. This also holds for evaluations in the backward pass, when the model has
    gone on with its cache.

    Args:
        cache: the cache of the model.
        index: the index of the layer in the cache.
    """

    def __init__(self, cache: Cache, index: int) -> None:
        self._cache, self._index, self._writes = cache, index, False
        self._before = self._apart(cache)

    @property
    def length(self) -> Any:
        """The number of tokens in the cache; a tensor if the cache is static."""
        return self._before.get_seq_length(self._index)

    @property
    def is_static(self) -> bool:
        """Whether the tensors of the cache have their final length from the start."""
        layers = self._before.layers[self._index : self._index + 1]
        return any(isinstance(layer, StaticLayer) for layer in layers)

    def alone(self) -> Cache:
        """Return a cache of this layer only; the layers before it already hold the new tokens."""
        alone = copy.copy(self._before)
        alone.layers = self._before.layers[self._index : self._index + 1]
        return alone

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the keys and values of all tokens, those in the cache first."""
        cache = self._cache if self._writes else self._apart(self._before)
        return cache.update(*args, **kwargs)

    @staticmethod
    @contextmanager
    def written(past: Past | None) -> Iterator[None]:
        """Let the evaluations of F write to the cache inside a `with` block."""
        if past is not None:
            past._writes = True
        try:
            yield
        finally:
            if past is not None:
                past._writes = False

    def _apart(self, cache: Cache) -> Cache:
        """Return a copy of a cache whose `update` does not change the original."""
        apart = copy.copy(cache)
        apart.layers = list(cache.layers)
        if self._index < len(apart.layers):
            layer = apart.layers[self._index] = copy.copy(apart.layers[self._index])
            if isinstance(layer, StaticLayer):  # a static layer writes into its tensors
                for name, value in vars(layer).items():
                    if isinstance(value, Tensor):
                        setattr(layer, name, value.clone())
        return apart

    def __getattr__(self, name: str) -> Any:
        """Return any other attribute that a layer reads, from the cache itself."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._cache, name)
