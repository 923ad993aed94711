"""torch.compile: solvers whose F is compiled, and code that must not be."""

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
    """Let a solver of (func, start, ...) take `compile` as well, see `compiled`."""

    @functools.wraps(solver)
    def solve(
        func: Callable[[State], State], start: State, *, compile: bool | str = False, **options: Any
    ) -> R:
        return solver(compiled(func, compile), start, **options)

    return solve


def check_compile(compile: Any) -> bool | str:
    """Return whether to compile, or a mode of `torch.compile`.

    Raises:
        ValueError: if it is neither.
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
    """Return F compiled, if that is asked for.

    Args:
        func: F. What was compiled is found again by its code: a closure made anew each training
            step does not compile anew.
        compile: see `check_compile`.
        owner: whose F it is, a model or a layer. The compiler keeps no more than a few versions of
            one code: of a code that many models share it would soon have enough.
        dynamic: as `torch.compile` has it: None for a second compilation, for any size, where a
            size has changed.

    Raises:
        ValueError: if it is neither.
    """
    wanted = check_compile(compile)
    if not wanted or torch.compiler.is_compiling():  # by the whole model's compiler
        return func
    mode = wanted if isinstance(wanted, str) else None
    lives = owner is not None and not getattr(owner, "_is_replica", False)  # DataParallel's do not
    if lives and isinstance(func, types.FunctionType):
        func = cast(_F, _with_code_of(owner, func))
    made = torch.compile(func, mode=mode, dynamic=dynamic)
    _keep_one_backend()
    return cast(_F, made)


def _keep_one_backend() -> None:
    """Forget the backend of the last call of `torch.compile`, if one that is equal is kept.

    PyTorch keeps that of every call, to reset it: a closure made anew in each training step would
    take a little more memory each time.
    """
    frames = sys.modules.get("torch._dynamo.eval_frame")
    kept: dict[int, Any] = getattr(frames, "cached_backends", {})
    *before, last = list(kept.items()) or [(0, None)]
    if any(backend == last[1] for _, backend in before):
        kept.pop(last[0], None)


# Kept for as long as an owner lives, and what was compiled of them with them.
_codes: weakref.WeakKeyDictionary[object, dict[types.CodeType, types.CodeType]]
_codes = weakref.WeakKeyDictionary()
_numbers = itertools.count()


def _with_code_of(owner: object, func: types.FunctionType) -> types.FunctionType:
    """Return the same function with a copy of its code that is the owner's."""
    codes, code = _codes.setdefault(owner, {}), func.__code__
    if code not in codes:  # under a name of its own: by that the compiler notes changing sizes
        codes[code] = code.replace(co_name=f"{code.co_name}_{next(_numbers)}")
    own = types.FunctionType(
        codes[code], func.__globals__, func.__name__, func.__defaults__, func.__closure__
    )
    own.__kwdefaults__ = func.__kwdefaults__
    return own


def never_compiled(function: _F) -> _F:
    """Run a function as it is also inside a compiled model, with all that it calls.

    For code on hooks of saved tensors and modes, of which compiled graphs know nothing, and for
    what changes with every call. Unlike `torch.compiler.disable` it costs nothing where nothing is
    compiled, the import of the compiler included.
    """
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        if may_be_compiled():  # the compiler may have given up on our caller, but not on us
            if not disabled:
                disabled.append(torch.compiler.disable(function))
            return disabled[0](*args, **kwargs)
        return function(*args, **kwargs)

    # The compiler counts by code: of one that all functions share it would soon have enough.
    code: Any = call
    code.__code__ = code.__code__.replace(co_name=function.__name__)
    return cast(_F, call)


class _Eager(AbstractContextManager[None]):
    """`torch.compiler.set_stance("force_eager")`, for as long as any thread is inside.

    The stance is one for all threads, and each would put back what it found.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._stance: AbstractContextManager[Any] | None = None

    def __enter__(self) -> None:
        with self._lock:
            # Where nothing is compiled yet, the import would take seconds.
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
    """Whether anything that runs here may be compiled code; false before the first compilation."""
    return torch.compiler.is_compiling() or "torch._dynamo" in sys.modules


def hooks_unsaid() -> AbstractContextManager[None]:
    """Keep PyTorch from warning of a hook of ours where a compiled module runs.

    Nobody can act on it.
    """
    if not may_be_compiled():
        return nullcontext()
    return ignored(r"Using `torch.compile\(module\)` when there are global hooks", UserWarning)


def eager() -> AbstractContextManager[None]:
    """Run what was compiled as it was written, inside a `with` block.

    A backward pass that was compiled where no graph was to be kept may overwrite what was saved
    for it; on such a graph the second product is refused or, from a cache on disk that another
    process has filled, silently wrong (PyTorch 2.13.0 and 2.14.1). An eager graph is good for any
    number of products, and for second derivatives, which compiled code has none of.

    What goes on in other threads meanwhile is not compiled either. For functions that are
    `never_compiled`: the compiler refuses to change its ways in the middle of its own code.
    """
    return _eager


def as_written(func: Callable[..., R]) -> Callable[..., R]:
    """Return a function that runs what was compiled as it was written, see `eager`."""

    @never_compiled
    def evaluate(*args: Any, **kwargs: Any) -> R:
        with eager():
            return func(*args, **kwargs)

    return evaluate
