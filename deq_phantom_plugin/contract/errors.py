"""What can go wrong."""

from __future__ import annotations

from collections.abc import Sequence


class ConvergenceWarning(RuntimeWarning):
    """An iteration stopped short of its tolerance; the result is the best it found."""


class AssumptionWarning(RuntimeWarning):
    """F is not what a gradient takes it for; says what was found, and what is done about it."""


class NonFiniteError(FloatingPointError, RuntimeError):
    """A solve that started from finite numbers made a NaN or an infinity.

    Attributes:
        samples: in which, where they are known.
    """

    samples: Sequence[int] = ()


class ConvergenceError(RuntimeError):
    """A solve failed, and that was to be an error."""
