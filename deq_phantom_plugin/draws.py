"""Random numbers inside F that are the same at every evaluation of a solve."""

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

    A map that drops other units each time has no equilibrium. So the first evaluation draws as
    usual. Later ones begin with the random state in which the first one began, and leave the random
    state as they found it. An F that draws nothing costs one comparison of random states.

    It controls PyTorch's own generators: that of the CPU, and that of the state's device. Compiled
    code makes other numbers from the same random state. Products with the Jacobian run F as it was
    written, so an F that draws runs as it was written everywhere.

    Args:
        func: F, for one solve and its backward pass.
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
            # Activation checkpointing counts what autograd saves, and must see one evaluation.
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
