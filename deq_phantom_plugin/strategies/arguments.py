"""Checks of strategies' arguments: errors that name the value and what is accepted."""

from __future__ import annotations

import math
import operator
import sys
from typing import Any


def positive_int(name: str, value: Any) -> int:
    """Return `value` as an int of at least 1.

    Raises:
        ValueError: if it is not one.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r}; expected a whole number of at least 1") from None
    if not 1 <= number <= sys.maxsize:  # a larger one could not even be printed
        raise ValueError(f"{name}={value!r}; expected a whole number of at least 1")
    return number


def whole_number(name: str, value: Any) -> int:
    """Return `value` as an int of at least 0.

    Raises:
        ValueError: if it is not one.
    """
    if isinstance(value, int) and value == 0 and not isinstance(value, bool):
        return 0
    try:
        return positive_int(name, value)
    except ValueError:
        raise ValueError(f"{name}={value!r}; expected a whole number of at least 0") from None


def positive_float(name: str, value: Any) -> float:
    """Return `value` as a finite float above 0.

    Raises:
        ValueError: if it is not one.
    """
    number = _as_float(value)
    if number is None or not 0 < number < math.inf:
        raise ValueError(f"{name}={value!r}; expected a finite number above 0")
    return number


def nonnegative_float(name: str, value: Any) -> float:
    """Return `value` as a finite float of at least 0.

    Raises:
        ValueError: if it is not one.
    """
    number = _as_float(value)
    if number is None or not 0 <= number < math.inf:
        raise ValueError(f"{name}={value!r}; expected a finite number of at least 0")
    return number


def positive_or_none(name: str, value: Any) -> float | None:
    """Return `value` as a finite float above 0, or None.

    Raises:
        ValueError: if it is neither.
    """
    number = None if value is None else _as_float(value)
    if value is not None and (number is None or not 0 < number < math.inf):
        raise ValueError(f"{name}={value!r}; expected a finite number above 0, or None")
    return number


def probability(name: str, value: Any) -> float:
    """Return `value` as a float in (0, 1).

    Raises:
        ValueError: if it is not one.
    """
    number = _as_float(value)
    if number is None or not 0 < number < 1:
        raise ValueError(f"{name}={value!r}; expected a number in (0, 1)")
    return number


def relaxation(value: Any) -> float:
    """Return `value` as a relaxation factor that can be undone: a float in (0, 2) other than 1.

    Raises:
        ValueError: if it is not one.
    """
    number = _as_float(value)
    if number is None or not 0 < number < 2 or number == 1:
        raise ValueError(
            f"beta={value!r}; expected a number in (0, 1) or (1, 2). At 1 a step forgets the state "
            "that it came from, and cannot be undone: use bptt"
        )
    return number


def damping_factor(value: Any) -> float | str:
    """Return `value` as a damping factor: a float in (0, 1], or "adaptive".

    Raises:
        ValueError: if it is neither.
    """
    if value == "adaptive":
        return "adaptive"
    number = _as_float(value)
    if number is None or not 0 < number <= 1:
        raise ValueError(f"lam={value!r}; expected a number in (0, 1] or 'adaptive'")
    return number


def boolean(name: str, value: Any) -> bool:
    """Return `value` as a bool.

    Raises:
        ValueError: if it is not one.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}; expected True or False")
    return value


def _as_float(value: Any) -> float | None:
    if isinstance(value, bool | str):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
