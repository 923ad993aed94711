"""Keeps weights that PyTorch cached without autograd out of evaluations that need gradients.

PyTorch caches weights in two places: `parametrize.cached()` keeps parametrized weights, and
autocast keeps weights that it has cast. If a solve under `torch.no_grad` fills these caches, later
evaluations with autograd would use weights without a graph, and the parameters would get no
gradient. This file drops such entries, so that PyTorch computes them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from .trees import State


class CachedWeights:
    """Drops cached weights without a graph before an evaluation of F with autograd.

    PyTorch then computes these weights once more, with a graph, and caches them as before.
    """

    def __init__(self) -> None:
        self._evaluated = False  # whether the latest evaluation was one with autograd

    def prepare(self) -> None:
        """Drop what the next evaluation of F must not use; to be called before each of them."""
        if torch.compiler.is_compiling():  # compiled code has casts of its own, without a cache
            return
        if not torch.is_grad_enabled():
            self._evaluated = False
            return
        _forget_constants()
        # Some versions of PyTorch also cache casts that were made without autograd.
        if not self._evaluated and torch.is_autocast_cache_enabled() and _under_autocast():
            torch.clear_autocast_cache()
        self._evaluated = True

    def evaluate(self, func: Callable[[State], State], state: State) -> State:
        """Prepare, and return F(h).

        In lockstep a process may evaluate F for others while it waits for its own turn, and fill
        the caches again. So what waits for its turn is this, not F alone.
        """
        self.prepare()
        return func(state)


def _forget_constants() -> None:
    """Drop the weights without a graph from the cache of `parametrize.cached()`."""
    for key, weight in list(parametrize._cache.items()):
        if isinstance(weight, Tensor) and not weight.requires_grad:
            del parametrize._cache[key]


def _under_autocast() -> bool:
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


@contextmanager
def made_anew() -> Iterator[None]:
    """Compute parametrized weights again inside a `with` block, in spite of a cache around it.

    This is for evaluations that backward repeats: the cache may hold other weights by then.
    """
    before = parametrize._cache_enabled
    if not before:
        yield
        return
    if torch.is_grad_enabled():  # layers after the equilibrium may use the same weights
        _forget_constants()
    parametrize._cache_enabled = 0
    try:
        yield
    finally:
        parametrize._cache_enabled = before
