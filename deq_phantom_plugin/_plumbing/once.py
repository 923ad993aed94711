"""Warnings that are given once per run, and name the user's line."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_given: dict[str, object] = {}
_BETWEEN = (__name__.partition(".")[0], "torch", "torchdeq")
"""Packages whose lines lie between the user's line and a warning of ours."""


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Give a warning that names the user's line: the innermost one outside of `_BETWEEN`."""
    level, frame = 2, sys._getframe(1)
    while frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        if frame.f_back is None:  # a thread of autograd's: there is no line of the user's
            level = 2
            break
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def warn_once(key: str, message: str, category: type[RuntimeWarning]) -> None:
    """Give a warning once per run and `key`.

    Python's own registry tells warnings apart by their text, and a text that holds a residual
    is new every time. Like that registry, this one starts anew inside
    `warnings.catch_warnings`, which swaps the list of filters.
    """
    if _given.get(key) is not warnings.filters:
        _given[key] = warnings.filters
        warn(message, category)


@contextmanager
def muted(category: type[Warning]) -> Iterator[None]:
    """Give no warning of a category inside a `with` block; one given before is not given again."""
    given = dict(_given)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category)
            yield
    finally:
        _given.update(given)


@contextmanager
def ignored(message: str, category: type[Warning]) -> Iterator[None]:
    """Give no warning of a kind inside a `with` block; others once per run, as outside."""
    outside = warnings.filters
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message, category)
        inside = warnings.filters
        _rename(outside, inside)
        try:
            yield
        finally:
            _rename(inside, outside)


def _rename(old: object, new: object) -> None:
    for key in [key for key, filters in _given.items() if filters is old]:
        _given[key] = new
