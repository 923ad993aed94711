"""Random numbers inside F: the same ones at every evaluation of a solve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._plumbing.buffers import Buffers
from ._plumbing.compilation import as_written, may_be_compiled
from ._plumbing.random_state import forked_rng, is_same, random_state, set_random_state
from .contract.state import State, flatten


class SameDraws:
    """F, which draws the same random numbers at every evaluation: those of the first.

    A map that drops other units each time has no equilibrium. The first evaluation draws as it
    would anyway; later ones begin with the random state in which that one began, and leave the
    state as they found it. An F that draws nothing pays for one look at that.

    PyTorch's own generators are meant, the CPU's and that of the state's device. Compiled code
    makes other numbers of the same random state, and products with the Jacobian are of F as it was
    written: so is all of an F that draws.

    Args:
        func: F, for one solve and its backward.
    """

    def __init__(self, func: Callable[..., Any]) -> None:
        self._func = self.__wrapped__ = func
        self._start: list[Tensor] | None = None  # the random state at first, once there was one
        self._draws = False

    def __call__(self, *state: State) -> Any:
        """Evaluate F."""
        leaves = flatten(state)[0]
        if self._start is None:
            return self._first(state, leaves)
        if not self._draws:
            return self._func(*state)
        with forked_rng(leaves):
            set_random_state(leaves, self._start)
            return as_written(self._func)(*state)

    def _first(self, state: tuple[State, ...], leaves: Sequence[Tensor]) -> Any:
        """Evaluate F, and find out whether it draws."""
        start = random_state(leaves)
        if torch.is_grad_enabled() and may_be_compiled():
            # Whoever counts what autograd saves is to see one evaluation, as it will be again.
            buffers = Buffers()
            try:
                with forked_rng(leaves), buffers.noting(), torch.no_grad():
                    as_written(self._func)(*state)
                    self._draws = not is_same(start, random_state(leaves))
            finally:
                buffers.put_back()
            self._start = start
            return (as_written(self._func) if self._draws else self._func)(*state)
        image = self._func(*state)
        self._draws = not is_same(start, random_state(leaves))
        self._start = start
        if not (self._draws and may_be_compiled()):
            return image
        with forked_rng(leaves):
            set_random_state(leaves, start)
            return as_written(self._func)(*state)
