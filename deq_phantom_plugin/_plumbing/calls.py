"""Counts how often a solve calls its map F, also where F or the solver is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .compilation import never_compiled
from .trial import Trial


class Calls:
    """How often a map was called; calls in trials inside the solve do not count.

    The counting is never compiled. The compiler takes a Python number for a constant, and would
    compile again for each new count.
    """

    def __init__(self) -> None:
        self._made = {False: 0, True: 0}  # calls without and with autograd
        self._depth = Trial.depth()  # not always 0: a report runs a whole model inside a trial

    @never_compiled
    def note(self) -> None:
        """Count a call."""
        if Trial.depth() == self._depth:
            self._made[torch.is_grad_enabled()] += 1

    @never_compiled
    def by_solver(self) -> bool:
        """Whether a solver has called the map, rather than only a strategy.

        Solvers call it without autograd. A strategy that owns the solve calls it with autograd.
        """
        return self._made[False] > 0

    @never_compiled
    def of_solve(self) -> Tensor:
        """Return how many calls the solve took, an integer tensor of shape ().

        These are the calls without autograd, or, if there are none, the calls with autograd.
        """
        return torch.tensor(self._made[False] or self._made[True])


class Counted:
    """A map whose calls are counted.

    Args:
        func: the map.

    Attributes:
        func: the map, as given.
        calls: how often it was called.
    """

    def __init__(self, func: Callable[..., Any]) -> None:
        self.func = self.__wrapped__ = func
        self.calls = Calls()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the map."""
        self.calls.note()
        return self.func(*args, **kwargs)

    @property
    @never_compiled
    def nfe(self) -> int:
        """The number of evaluations that the solve took, see `Calls.of_solve`."""
        return int(self.calls.of_solve())
