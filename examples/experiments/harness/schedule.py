"""Learning rates, as functions of the step alone."""

from __future__ import annotations

import math


def cosine(step: int, steps: int, highest: float, lowest: float = 0.0, warmup: int = 0) -> float:
    """Return a learning rate: a linear rise, then half a cosine.

    Args:
        step: from 0.
        steps: of the whole run.
        highest: the rate after the rise.
        lowest: the rate at the end.
        warmup: steps of the rise.
    """
    if step < warmup:
        return highest * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return lowest + (highest - lowest) * 0.5 * (1 + math.cos(math.pi * share))
