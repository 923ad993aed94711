"""Weights that PyTorch keeps between evaluations of F, some of them made without autograd."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.utils import parametrize


class CachedWeights:
    """Keeps evaluations with autograd from weights that a solve under `torch.no_grad` left behind.

    Inside `parametrize.cached()` a weight is made from its originals once, and under autocast cast
    once; if the solve did that, no gradient would get past it. Such weights are made anew, once,
    and then kept as before.
    """

    def __init__(self) -> None:
        self._evaluated = False  # with autograd, since it was last without

    def prepare(self) -> None:
        """Be told that F is about to be evaluated."""
        if torch.compiler.is_compiling():  # which casts by itself, and knows of no such cache
            return
        if not torch.is_grad_enabled():
            self._evaluated = False
            return
        _forget_constants()
        # PyTorch's own casts without autograd are not kept in all of its versions.
        if not self._evaluated and torch.is_autocast_cache_enabled() and _under_autocast():
            torch.clear_autocast_cache()
        self._evaluated = True


def _forget_constants() -> None:
    """Drop what `parametrize.cached()` holds that was made without autograd."""
    for key, weight in list(parametrize._cache.items()):
        if isinstance(weight, Tensor) and not weight.requires_grad:
            del parametrize._cache[key]


def _under_autocast() -> bool:
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


@contextmanager
def made_anew() -> Iterator[None]:
    """Make weights anew in evaluations inside a `with` block, in spite of `parametrize.cached()`.

    For evaluations that are done again in backward, when the cache holds something else.
    """
    before = parametrize._cache_enabled
    if not before:
        yield
        return
    if torch.is_grad_enabled():  # what comes after the equilibrium may use the same weights
        _forget_constants()
    parametrize._cache_enabled = 0
    try:
        yield
    finally:
        parametrize._cache_enabled = before
