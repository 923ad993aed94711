"""The errors and warnings of this package that Python does not have."""

from __future__ import annotations

from collections.abc import Sequence


class ConvergenceWarning(RuntimeWarning):
    """An iteration stopped short of its tolerance. The result is the best that it found."""


class AssumptionWarning(RuntimeWarning):
    """F, or what a gradient is told, is not as the gradient takes it to be.

    The message says what was found, and what is done.
    """


class NonFiniteError(FloatingPointError, RuntimeError):
    """A solve that started from finite numbers made a NaN or an infinity.

    Attributes:
        samples: the indices of the samples in which it did; empty where they are not known.
    """

    samples: Sequence[int] = ()


class ConvergenceError(RuntimeError):
    """A solve failed, and the user's policy makes that an error (`on_failure="raise"`)."""
