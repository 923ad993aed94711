"""torch.compile: compiles F for a solver, and keeps other code out of compilation.

`compiled` compiles F, and finds code that was compiled before. `never_compiled` marks functions
that must run as plain Python even inside a compiled model. `eager` runs compiled code as it was
written.
"""

from __future__ import annotations

import functools
import itertools
import sys
import threading
import types
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch

from .once import ignored
from .trees import State

R = TypeVar("R")
_F = TypeVar("_F", bound=Callable[..., Any])


def may_compile(solver: Callable[..., R]) -> Callable[..., R]:
    """Decorate a solver of (func, start, ...), so that it takes `compile=` too, see `compiled`."""

    @functools.wraps(solver)
    def solve(
        func: Callable[[State], State], start: State, *, compile: bool | str = False, **options: Any
    ) -> R:
        return solver(compiled(func, compile), start, **options)

    return solve


def check_compile(compile: Any) -> bool | str:
    """Return `compile` if it is a bool or a mode of `torch.compile`.

    Raises:
        ValueError: if `compile` is neither.
    """
    if isinstance(compile, bool) or (isinstance(compile, str) and compile):
        return compile
    raise ValueError(
        f"compile={compile!r}; expected True, False, or a mode of torch.compile such as "
        "'reduce-overhead'"
    )


def compiled(
    func: _F, compile: bool | str, owner: object = None, *, dynamic: bool | None = False
) -> _F:
    """Return F, compiled if `compile` asks for it.

    Args:
        func: F. The compiler finds earlier results by the code object of F. So a closure that is
            made in each training step is compiled once.
        compile: whether to compile, or a mode of `torch.compile`.
        owner: the model or layer that F belongs to. F gets a code object for each owner. The
            compiler keeps only a few versions of one code object, and models that share one would
            exceed that limit.
        dynamic: as in `torch.compile`. None compiles a second time, for any size, when a size has
            changed.

    Raises:
        ValueError: if `compile` is invalid.
    """
    wanted = check_compile(compile)
    if not wanted or torch.compiler.is_compiling():  # F is compiled with the whole model then
        return func
    mode = wanted if isinstance(wanted, str) else None
    # Replicas of DataParallel live for one forward pass only.
    lives = owner is not None and not getattr(owner, "_is_replica", False)
    if lives and isinstance(func, types.FunctionType):
        func = cast(_F, _with_code_of(owner, func))
    made = torch.compile(func, mode=mode, dynamic=dynamic)
    _keep_one_backend()
    return cast(_F, made)


def _keep_one_backend() -> None:
    """Drop the backend of the last call of `torch.compile`, if PyTorch keeps an equal one.

    PyTorch keeps the backend of every call, to be able to reset them. A closure that is compiled in
    each training step would thus leak a little memory in each step.
    """
    frames = sys.modules.get("torch._dynamo.eval_frame")
    kept: dict[int, Any] = getattr(frames, "cached_backends", {})
    *before, last = list(kept.items()) or [(0, None)]
    if any(backend == last[1] for _, backend in before):
        kept.pop(last[0], None)


# Copies of code objects by owner. They, and what was compiled from them, live as long as the owner.
_codes: weakref.WeakKeyDictionary[object, dict[types.CodeType, types.CodeType]]
_codes = weakref.WeakKeyDictionary()
_numbers = itertools.count()


def _with_code_of(owner: object, func: types.FunctionType) -> types.FunctionType:
    """Return the same function with a copy of its code object that belongs to the owner."""
    codes, code = _codes.setdefault(owner, {}), func.__code__
    if code not in codes:  # the name is new, too: the compiler notes changed sizes by the name
        codes[code] = code.replace(co_name=f"{code.co_name}_{next(_numbers)}")
    own = types.FunctionType(
        codes[code], func.__globals__, func.__name__, func.__defaults__, func.__closure__
    )
    own.__kwdefaults__ = func.__kwdefaults__
    return own


def never_compiled(function: _F) -> _F:
    """Decorate a function, so that it and all that it calls stay uncompiled in a compiled model.

    This is for code that uses hooks of saved tensors or modes, which compiled graphs ignore, and
    for code with numbers that change in every call. Unlike `torch.compiler.disable` it does not
    import the compiler, and so costs nothing where nothing is compiled.
    """
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        if may_be_compiled():  # the compiler may skip our caller, and still try to compile us
            if not disabled:
                disabled.append(torch.compiler.disable(function))
            return disabled[0](*args, **kwargs)
        return function(*args, **kwargs)

    # The compiler limits the versions of one code object. So each function gets a copy of its own.
    code: Any = call
    code.__code__ = code.__code__.replace(co_name=function.__name__)
    return cast(_F, call)


class _Eager(AbstractContextManager[None]):
    """Keeps `torch.compiler.set_stance("force_eager")` for as long as any thread is inside.

    PyTorch has one stance for all threads. The first thread that enters sets it, and the last one
    that leaves restores it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._stance: AbstractContextManager[Any] | None = None

    def __enter__(self) -> None:
        with self._lock:
            # If nothing is compiled yet, there is nothing to do; the import would take seconds.
            if self._stance is None and may_be_compiled():
                self._stance = torch.compiler.set_stance("force_eager")
                self._stance.__enter__()
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._stance is not None:
                stance, self._stance = self._stance, None
                stance.__exit__(None, None, None)


_eager = _Eager()


def may_be_compiled() -> bool:
    """Whether code that runs here may be compiled; False as long as the compiler is not loaded."""
    return torch.compiler.is_compiling() or "torch._dynamo" in sys.modules


def hooks_unsaid() -> AbstractContextManager[None]:
    """Ignore PyTorch's warning of global hooks, which it gives where a compiled module runs.

    The hook is this package's own, so that users cannot act on the warning.
    """
    if not may_be_compiled():
        return nullcontext()
    return ignored(r"Using `torch.compile\(module\)` when there are global hooks", UserWarning)


def eager() -> AbstractContextManager[None]:
    """Run compiled functions uncompiled, as they were written, inside a `with` block.

    A compiled backward pass may overwrite its saved tensors, if it was compiled for a graph that is
    used once. A second product on such a graph is refused. With a cache on disk that another
    process has filled, it is even silently wrong (PyTorch 2.13.0 and 2.14.1). An uncompiled graph
    allows any number of products, and second derivatives, which compiled code does not have.

    Other threads do not run compiled code during the block either. Use it in functions that are
    `never_compiled` only: PyTorch refuses to change its stance inside of compiled code.
    """
    return _eager


def as_written(func: Callable[..., R]) -> Callable[..., R]:
    """Return a function that runs `func` uncompiled, see `eager`."""

    @never_compiled
    def evaluate(*args: Any, **kwargs: Any) -> R:
        with eager():
            return func(*args, **kwargs)

    return evaluate
