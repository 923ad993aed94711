"""A recurrence whose evaluations are numbered: noise, an embedding or a cache go by the number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .._plumbing.trial import Trial
from ..contract.state import State
from ..loop import At


class Recurrence:
    """The evaluations of a loop by their number, of which F is the last.

    Args:
        evaluate: evaluation number i, from 0: (i, state) -> state.
        steps: how many there are, at least 1.

    Attributes:
        before: the state before the last evaluation, detached; None until there was one.
    """

    def __init__(self, evaluate: At, steps: int) -> None:
        self._evaluate, self._steps, self._done = evaluate, steps, 0
        self.before: State | None = None

    def at(self, i: int, state: State) -> State:
        """Do evaluation number i."""
        self._note(state)
        return self._evaluate(i, state)

    def func(self, state: State) -> State:
        """Do the last evaluation, at any state: F."""
        if self._done < self._steps and not Trial.depth():  # later ones are of the gradient alone
            self._note(state)
        return self._evaluate(self._steps - 1, state)

    def _note(self, state: State) -> None:
        self._done += 1
        self.before = tree_map(Tensor.detach, state)


def refuse_cache(cache: Any, named: bool) -> None:
    """Refuse a cache of keys and values where F is evaluated more than once.

    Args:
        cache: the cache, None where there is none.
        named: whether a strategy or an observer evaluates F again.

    Raises:
        ValueError: if there is one.
    """
    if cache is not None and named and torch.is_grad_enabled():
        raise ValueError(
            "a cache in training: a strategy evaluates the recurrent block again and would fill "
            "the cache twice; pass no cache (use_cache=False), or call dpp.set_grad(model, None)"
        )
