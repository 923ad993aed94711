"""Gives warnings once per run that name the user's line, and silences warnings.

Python's `warnings` module recognises a warning by its text. Texts here hold numbers that change, so
this file recognises a warning by a key.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_given: dict[str, object] = {}
_BETWEEN = (
    __name__.partition(".")[0],
    *("torch", "torchdeq", "accelerate", "lightning", "pytorch_lightning", "transformers"),
)
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

    Inside `warnings.catch_warnings` each warning is given once more, as Python does with its own
    registry. A new list of filters shows that such a block was entered.
    """
    if _given.get(key) is not warnings.filters:
        _given[key] = warnings.filters
        warn(message, category)


@contextmanager
def muted(category: type[Warning]) -> Iterator[None]:
    """Silence a category inside a `with` block; warnings given before it are not given again."""
    given, outside = dict(_given), warnings.filters
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category)
            _rename(outside, warnings.filters)
            yield
    finally:
        _given.update(given)


@contextmanager
def ignored(message: str, category: type[Warning]) -> Iterator[None]:
    """Silence one warning inside a `with` block; others are still given once per run.

    Args:
        message: a regular expression for the beginning of the warning's text.
        category: the category of the warning.
    """
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
    """Let the warnings that were given under one list of filters count as given under another."""
    for key in [key for key, filters in _given.items() if filters is old]:
        _given[key] = new
