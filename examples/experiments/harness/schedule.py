"""Learning rates and gradients as functions of the training step."""

from __future__ import annotations

import math


def cosine(step: int, steps: int, highest: float, lowest: float = 0.0, warmup: int = 0) -> float:
    """Return the learning rate of a step: a linear rise, and then half a cosine.

    Args:
        step: the step, counted from 0.
        steps: the number of steps of the whole run.
        highest: the rate after the rise.
        lowest: the rate at the end.
        warmup: the number of steps of the rise.
    """
    if step < warmup:
        return highest * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return lowest + (highest - lowest) * 0.5 * (1 + math.cos(math.pi * share))


def after_pretraining(grad: str | int, pretrain_steps: int, layers: int, steps: int) -> str | int:
    """Return a spec that pretrains by unrolling, and then uses a gradient.

    Args:
        grad: the spec of the gradient.
        pretrain_steps: the number of steps of pretraining; 0 for none.
        layers: the number of evaluations that pretraining unrolls.
        steps: the number of steps of the whole run.

    Raises:
        ValueError: if no step is left for the gradient.
    """
    if pretrain_steps == 0:
        return grad
    if not 0 < pretrain_steps < steps:
        raise ValueError(f"pretrain_steps={pretrain_steps} of {steps} steps; expected fewer")
    stages = {0: f"bptt(steps={layers})", pretrain_steps: grad}
    return f"schedule({stages!r})"
