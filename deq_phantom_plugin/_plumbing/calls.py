"""How often a map is called in a solve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .compilation import never_compiled
from .trial import Trial


class Calls:
    """How often a map was called, counted outside of compiled code.

    A number that changes with every call is a constant to the compiler, which compiles anew for
    each until it gives up. Trials inside the solve do not count.
    """

    def __init__(self) -> None:
        self._made = {False: 0, True: 0}  # without and with autograd
        self._depth = Trial.depth()  # a report may run the whole model in one

    @never_compiled
    def note(self) -> None:
        """Count a call."""
        if Trial.depth() == self._depth:
            self._made[torch.is_grad_enabled()] += 1

    @never_compiled
    def by_solver(self) -> bool:
        """Whether a solver called it.

        Solvers run without autograd; strategies with, and alone where they own the solve.
        """
        return self._made[False] > 0

    @never_compiled
    def of_solve(self) -> Tensor:
        """Return how many calls the solve took, an integer tensor of shape ()."""
        return torch.tensor(self._made[False] or self._made[True])


class Counted:
    """A map whose calls are counted.

    Args:
        func: the map.

    Attributes:
        func: as it was given.
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
        """Evaluations of the solve: solvers run without autograd, strategies that own it with."""
        return int(self.calls.of_solve())
