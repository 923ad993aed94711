"""Forward solvers whose F is compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ..state import State

R = TypeVar("R")


def may_compile(solver: Callable[..., R]) -> Callable[..., R]:
    """Let a solver of (func, start, ...) take `compile` as well.

    Compiled code is found again by the code of F: a closure made anew each training step does not
    compile anew.
    """

    @functools.wraps(solver)
    def solve(
        func: Callable[[State], State], start: State, *, compile: bool | str = False, **options: Any
    ) -> R:
        if compile:
            mode = compile if isinstance(compile, str) else None
            func = torch.compile(func, mode=mode, dynamic=False)
        return solver(func, start, **options)

    return solve
