"""Tells functions apart, where a closure that is made anew in each call is to count as the same."""

from __future__ import annotations

import functools
import weakref
from typing import Any

from torch import nn

_DEEPEST = 10  # the most wrappers around a function that are looked through


def identity(func: Any) -> tuple[Any, ...]:
    """Return a key for a function, hashable.

    It holds the function's code, which is the same when a closure is made anew, and the modules
    inside. The last entry holds the numbers and names inside, such as the i of `self.blocks[i]`.
    """
    inside: list[Any] = []
    for _ in range(_DEEPEST):
        if isinstance(func, functools.partial):
            inside += [*func.args, *func.keywords.values()]
            func = func.func
        elif callable(inner := getattr(func, "__wrapped__", None)):
            func = inner
        else:
            break
    inside.append(getattr(func, "__self__", func))
    inside += [c.cell_contents for c in getattr(func, "__closure__", None) or () if _full(c)]
    inside += getattr(func, "__defaults__", None) or ()
    code = getattr(getattr(func, "__func__", func), "__code__", type(func))
    # Not the `id` of a module: a later module may have the same.
    modules = (weakref.ref(x) for x in inside if isinstance(x, nn.Module))
    return (code, *modules, tuple(x for x in inside if type(x) in (int, bool, str)))


def is_alive(key: tuple[Any, ...]) -> bool:
    """Whether all modules in a key that begins or ends with an `identity` are there still."""
    return all(part() is not None for part in key if isinstance(part, weakref.ref))


def _full(cell: Any) -> bool:  # whether a cell of a closure holds a value yet
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
