"""torch.compile: solvers whose F is compiled, and code that must not be."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
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


def eager() -> AbstractContextManager[Any]:
    """Run what was compiled as it was written, inside a `with` block.

    A backward pass that was compiled where no graph was to be kept may overwrite what was saved
    for it; on such a graph the second product is refused or, from a cache on disk that another
    process has filled, silently wrong (PyTorch 2.13.0 and 2.14.1). An eager graph is good for any
    number of products.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes seconds
        return contextlib.nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
