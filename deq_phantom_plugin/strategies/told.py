"""What a strategy is told: the training step, the length of training, which equilibrium it is."""

from __future__ import annotations

import math
from fractions import Fraction

import torch

from .._plumbing.once import warn_once
from ..contract.errors import AssumptionWarning
from ..contract.strategy import Context, GradStrategy


def told_step(context: Context, who: str) -> int:
    """Return the training step; 0 where nobody has told it.

    Args:
        context: the context of the strategy.
        who: the spec of the strategy that needs the step, for the warning.

    Warns:
        AssumptionWarning: once, if nobody has told the step.
    """
    step = context.current_step
    if step is None:
        warn_once(
            "schedule",
            f"{who} was not told the training step and takes it to be 0; call dpp.set_step(model, "
            "step) in the training loop, with total=... if fractions of training are meant. The "
            "callback SetStep does so in Lightning and in Transformers' Trainer. A call of "
            "dpp.attach or dpp.loop is told it only through a dpp.Memory that is in the model and "
            "in its context. This is said once per run.",
            AssumptionWarning,
        )
        return 0
    return step


def not_resolved(strategy: GradStrategy) -> ValueError:
    """Return the error for a question that only the strategy of the step can answer."""
    return ValueError(
        f"{strategy!r}: how often it evaluates F depends on the training step. Ask the strategy "
        "that `resolve(context)` returns"
    )


def told_place(context: Context, who: str) -> int:
    """Return which of its model's equilibria this is, from 0; 0 where nobody knows.

    Args:
        context: the context of the strategy.
        who: the spec of the strategy that needs the place, for the warning.

    Warns:
        AssumptionWarning: once, if the step is known and the place is not, as after the
            `state_dict` of a model was loaded. (Where neither is, the step's warning says enough.)
    """
    place = context.current_place
    if place is None and context.memory is not None and context.current_step is not None:
        warn_once(
            "place",
            f"{who} was not told in which of its model's equilibria it is, and takes it to be the "
            "first, so that all of them draw the same; call dpp.set_step(model, step) on the whole "
            "model before the forward pass",
            AssumptionWarning,
        )
    return place or 0


def told_call(context: Context, who: str) -> int:
    """Return which call of its step an equilibrium is in, from 0; 0 without a memory that counts.

    Args:
        context: the context of the strategy.
        who: the spec of the strategy that needs the call, for messages.

    Warns:
        AssumptionWarning: once, if the context has no memory.

    Raises:
        RuntimeError: if a backward pass calls again.
    """
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"{who} draws a number per call of a step, and here a backward pass calls again "
            "(activation checkpointing, or an F that is evaluated anew). Nobody knows which call "
            "it repeats, so the number could be another one. Draw once per step: per_call=False"
        )
    if context.memory is None:
        warn_once(
            "calls",
            f"{who} draws a number per call of a step, and nobody counts the calls: all of them "
            "draw the same. Put a dpp.Memory into the context, which counts them",
            AssumptionWarning,
        )
        return 0
    return context.memory.number_of_call()


def in_steps(when: int | float, context: Context, who: str) -> int:
    """Return a point of training as a number of steps.

    Args:
        when: a number of steps; or a float, a fraction of training in (0, 1].
        context: the context of the strategy.
        who: the spec of the strategy that asks, for the error.

    Raises:
        ValueError: if it is a fraction, and nobody has told the length of training.
    """
    if isinstance(when, int):
        return when
    total = context.current_total
    if total is None:
        raise ValueError(
            f"{who}: {when!r} is a fraction of training, and nobody has told its length; call "
            "dpp.set_step(model, step, total=...) in the training loop, or give a number of steps. "
            "The callback SetStep tells it in Lightning and in Transformers' Trainer"
        )
    return math.ceil(Fraction(repr(when)) * total)  # 0.07 of 100 is 7, which floats overshoot
