"""A loop whose evaluations are numbered, such as one with noise or an embedding for each number.

`Recurrence` makes such a loop out of a function of number and state. The hosts of recurrent models
use it, and refuse caches of keys and values with `refuse_cache`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .._plumbing.trial import Trial
from ..contract.state import State
from ..loop import At


class Recurrence:
    """The evaluations of a loop, by their number. F is the last one.

    Args:
        evaluate: makes evaluation number i, from 0: (i, state) -> state.
        steps: the number of evaluations, at least 1.

    Attributes:
        before: the state before the latest evaluation of the loop, detached; None before the first.
    """

    def __init__(self, evaluate: At, steps: int) -> None:
        self._evaluate, self._steps, self._done = evaluate, steps, 0
        self.before: State | None = None

    def at(self, i: int, state: State) -> State:
        """Return evaluation number i at a state."""
        self._note(state)
        return self._evaluate(i, state)

    def func(self, state: State) -> State:
        """Return F, the last evaluation, at any state."""
        # Evaluations after `steps` serve the gradient only, and those in a trial leave no trace.
        if self._done < self._steps and not Trial.depth():
            self._note(state)
        return self._evaluate(self._steps - 1, state)

    def _note(self, state: State) -> None:
        """Count an evaluation of the loop, and keep the state before it."""
        self._done += 1
        self.before = tree_map(Tensor.detach, state)


def refuse_cache(cache: Any, named: bool) -> None:
    """Refuse a cache of keys and values in training, if F may be evaluated once more.

    Args:
        cache: the cache, or None.
        named: whether a strategy or an observer evaluates F again.

    Raises:
        ValueError: if there is a cache, `named` is True and autograd is on.
    """
    if cache is not None and named and torch.is_grad_enabled():
        raise ValueError(
            "a cache in training: a strategy evaluates the recurrent block again and would fill "
            "the cache twice. Pass no cache (use_cache=False), or call dpp.set_grad(model, None) "
            "for the model's own gradient"
        )
