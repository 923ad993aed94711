"""torch.compile: solvers whose F is compiled, and code that must not be."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from .state import State

R = TypeVar("R")
_F = TypeVar("_F", bound=Callable[..., Any])


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


def never_compiled(function: _F) -> _F:
    """Run a function as it is also inside a compiled model, with all that it calls.

    For code on hooks of saved tensors and modes, of which compiled graphs know nothing. Unlike
    `torch.compiler.disable` it costs nothing where nothing is compiled, the import of the compiler
    included.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return cast(_F, call)
