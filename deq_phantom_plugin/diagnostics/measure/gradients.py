"""Measures strategies on one problem: how exact each gradient is, and what it costs.

First comes the reference gradient and then each strategy. A strategy that fails gets an error in
its row. Times are measured last, in turns, so that a change of the machine's speed hits all alike.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from ..._plumbing.once import muted
from ...contract.errors import ConvergenceWarning
from ...contract.state import flatten
from ...contract.strategy import GradStrategy
from ...strategies.registry import Spec, get_strategy
from .cost import now, peak_bytes
from .derivatives import cosine, relative_error, vjp
from .labels import label
from .problem import Gradient, Problem
from .reference import second_order_reference, solve_reference
from .results import Measurement, StrategyResult

LAMS = tuple(round(1 - 0.1 * i, 1) for i in range(10))

_RADIUS_VJPS = 60


def measure(
    problem: Problem,
    specs: Sequence[Spec],
    repeats: int,
    *,
    name: str,
    nfe: int | None = None,
    second_order: bool = False,
) -> Measurement:
    """Measure strategies on a problem; see `gradient_report`.

    Args:
        problem: the problem.
        specs: specs of the strategies.
        repeats: the number of timed runs per strategy.
        name: the name of the equilibrium.
        nfe: the evaluations of F that the solve took, if known.
        second_order: whether to compare second derivatives as well.

    Raises:
        ValueError: if `specs` is empty, a spec is invalid, F depends on none of the parameters, or
            the loss is no scalar that depends on the state.
    """
    strategies = [get_strategy(spec) for spec in specs]
    labels = [label(*pair) for pair in zip(specs, strategies, strict=True)]
    if not strategies:
        raise ValueError("grads is empty; expected at least one strategy")
    problem = replace(problem, params=problem.reached())
    problem.cotangent(problem.equilibrium)  # refuses a loss that cannot be used, before the work
    told, found = problem.context.batch_dim, problem.inspect()
    problem, whole = problem.settled(found.coupled)
    with muted(ConvergenceWarning):  # the report shows residuals instead
        method, reference = solve_reference(whole)
        lams = sorted({*LAMS, *(lam for s in strategies if (lam := _lam(s)))}, reverse=True)
        damped_radii = whole.radii(lams, _RADIUS_VJPS)
        results = _results(problem, strategies, labels, reference, damped_radii, repeats)
        if second_order:
            results = _with_second_order(results, problem, whole, strategies)
    return Measurement(
        name=name,
        batch_size=whole.packing.batch_size,
        elements=whole.packing.rows * whole.packing.columns,
        parameters=sum(p.numel() for p in problem.params),
        dtype=str(flatten(problem.equilibrium)[0][0].dtype).removeprefix("torch."),
        device=str(problem.device),
        forward_residual=problem.forward_residual(),
        nfe=nfe,
        batch_dim=told,
        samples_are_coupled=bool(found.coupled),
        map_difference=found.difference,
        map_reasons=list(found.reasons),
        reference=repr(method),
        reference_residual=reference.residual,
        reference_norm=reference.norm,
        radius=damped_radii[1.0],
        damped_radii=damped_radii,
        results=results,
    )


def _results(
    problem: Problem,
    strategies: Sequence[GradStrategy],
    labels: Sequence[str],
    reference: Gradient,
    damped_radii: Mapping[float, float],
    repeats: int,
) -> list[StrategyResult]:
    """Return a row per strategy, with times."""
    rows: list[StrategyResult] = []
    for strategy, name in zip(strategies, labels, strict=True):
        try:
            found = problem.differentiate(strategy)
            rows.append(
                StrategyResult(
                    strategy=repr(strategy),
                    label=name,
                    cosine=cosine(found.vector, reference.vector),
                    relative_error=relative_error(found.vector, reference.vector),
                    norm=found.norm,
                    residual=found.residual,
                    n_evaluations=found.n_evaluations,
                    n_vjp=found.n_vjp,
                    peak_bytes=peak_bytes(partial(_run, problem, strategy), problem.device),
                    damped_radius=damped_radii.get(_lam(strategy) or math.nan),
                )
            )
        except Exception as error:  # whatever a strategy raises, the others are still measured
            message = f"{type(error).__name__}: {error}"
            rows.append(StrategyResult(repr(strategy), label=name, error=message))
    times: list[list[tuple[float, float]]] = [[] for _ in strategies]
    for _ in range(repeats):
        for i, strategy in enumerate(strategies):
            if rows[i].error is not None:
                continue
            try:
                times[i].append(_run(problem, strategy))
            except Exception as error:  # one that draws may fail now and then
                message = f"{type(error).__name__}: {error}"
                rows[i] = StrategyResult(repr(strategy), label=labels[i], error=message)
                times[i].clear()
    return [
        replace(
            row,
            forward_seconds=statistics.median(forward for forward, _ in own),
            backward_seconds=statistics.median(backward for _, backward in own),
            time_spread=max(map(sum, own)) / min(map(sum, own)),
        )
        if own
        else row
        for row, own in zip(rows, times, strict=True)
    ]


def _with_second_order(
    rows: Sequence[StrategyResult],
    problem: Problem,
    whole: Problem,
    strategies: Sequence[GradStrategy],
) -> list[StrategyResult]:
    """Return the rows with the errors of second derivatives."""
    reference = second_order_reference(whole)
    found = []
    for strategy, row in zip(strategies, rows, strict=True):
        own = None if row.error else problem.second_derivative(strategy)
        if own is not None and reference is not None:
            row = replace(row, second_order_error=relative_error(own, reference))
        found.append(row)
    return found


def _run(problem: Problem, strategy: GradStrategy) -> tuple[float, float]:
    """Differentiate once, and return the seconds of forward and backward, without the loss."""
    start = now(problem.device)
    attached = problem.attach(strategy)
    forward = now(problem.device) - start
    v = problem.cotangent(attached)
    start = now(problem.device)
    vjp(flatten(attached)[0], problem.params, v)
    return forward, now(problem.device) - start


def _lam(strategy: GradStrategy) -> float | None:
    """Return the damping factor of a strategy that has a fixed one."""
    lam = getattr(strategy, "lam", None)
    return lam if isinstance(lam, float) and 0 < lam <= 1 else None
