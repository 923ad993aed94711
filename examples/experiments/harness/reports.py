"""What a gradient report says of a model along its training: cosines, radius, residual."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

import deq_phantom_plugin as dpp


def report_interval(every: int, evaluations: int) -> int:
    """Return the number of steps between reports, which are made in evaluations only.

    Args:
        every: the setting `report_every`; 0 for a report in every evaluation.
        evaluations: the number of steps between evaluations.

    Raises:
        ValueError: if there are no evaluations, or `every` is negative or no multiple of
            `evaluations`.
    """
    if evaluations < 1:
        raise ValueError(
            f"eval_every or eval_epochs gives {evaluations} steps between evaluations; expected at "
            "least 1"
        )
    if every < 0 or every % evaluations:
        raise ValueError(
            f"report_every={every!r}; expected a multiple of the {evaluations} steps between "
            "evaluations, or 0 for a report in each of them"
        )
    return every or evaluations


def is_due(step: int, every: int, steps: int) -> bool:
    """Whether a report is made after a step: at the start, at the end, every so many steps."""
    return step % every == 0 or step == steps


def reported(
    model: nn.Module,
    own: str | dpp.GradStrategy,
    inputs: Any,
    loss: Callable[[Any], Tensor],
    grads: Sequence[str],
) -> dict[str, float]:
    """Return what `dpp.model_report` finds, as numbers for a history.

    Of a model with several equilibria each number is the worst one of them.

    Args:
        model: the model.
        own: the gradient that it trains with.
        inputs: see `dpp.model_report`.
        loss: likewise.
        grads: specs of gradients.

    Returns:
        "cosine of SPEC" for each spec, "cosine" for the model's own gradient (both only where the
        exact gradient is known), "report_rho" (the spectral radius of df/dh) and "report_residual"
        (that of the exact gradient's solve).
    """
    reports = dpp.model_report(model, inputs, loss, grads, repeats=1).reports
    found: dict[str, float] = {
        "report_rho": max(report.radius for report in reports),
        "report_residual": max(report.reference_residual for report in reports),
    }
    for report in reports:
        rows = dict(zip(grads, report.results[-len(grads) :], strict=True))
        cosines = {f"cosine of {grad}": result.cosine for grad, result in rows.items()}
        # The model's own gradient comes first, unless it is one of those that were asked for.
        full = repr(dpp.get_strategy(own))
        is_asked = len(report.results) == len(grads)
        current = next(r for r in report.results if r.strategy == full or not is_asked)
        for key, cosine in {**cosines, "cosine": current.cosine}.items():
            if cosine is not None:
                found[key] = min(cosine, found.get(key, 1.0))
    return found
