"""The training step that a strategy goes by, and the length of training."""

from __future__ import annotations

import math

from .._plumbing.once import warn_once
from ..contract.errors import ConvergenceWarning
from ..contract.strategy import Context


def told_step(context: Context, who: str) -> int:
    """Return the training step; 0 where nobody has told it, with a warning that is said once.

    Args:
        context: of the strategy.
        who: needs it, as a spec.
    """
    step = context.current_step
    if step is None:
        warn_once(
            "schedule",
            f"{who} was not told the training step and takes it to be 0; call dpp.set_step(model, "
            "step) in the training loop, of a model whose dpp.Memory is in the context",
            ConvergenceWarning,
        )
        return 0
    return step


def in_steps(when: int | float, context: Context, who: str) -> int:
    """Return a point of training in steps; a float is a fraction of all of them.

    Args:
        when: a number of steps, or a fraction in (0, 1].
        context: of the strategy.
        who: asks, as a spec.

    Raises:
        ValueError: if it is a fraction, and nobody has told the length of training.
    """
    if isinstance(when, int):
        return when
    total = context.current_total
    if total is None:
        raise ValueError(
            f"{who}: {when!r} is a fraction of training, and nobody has told its length; call "
            "dpp.set_step(model, step, total=...) in the training loop, or give a number of steps"
        )
    return math.ceil(when * total)
