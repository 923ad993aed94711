"""How good and how dear each strategy's gradient is on a user's own equilibrium or model."""

from __future__ import annotations

import json
import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._plumbing.output import write_whole
from .._plumbing.trial import Trial
from ..adjoint import Packing
from ..contract.errors import ConvergenceWarning
from ..contract.state import State, flatten
from ..contract.strategy import Context, GradStrategy
from ..jacobian import spectral_radius
from ..strategies import IFT, Exact
from ..strategies.arguments import positive_int
from ..strategies.registry import Spec, get_strategy
from .cost import now, peak_bytes
from .derivatives import check_params
from .problem import Gradient, Problem
from .recommendation import POOR_REFERENCE, recommend

DEFAULT_GRADS: tuple[str, ...] = ("ift", "upg", "npg", "jfb")
LAMS = tuple(round(1 - 0.1 * i, 1) for i in range(10))

_DENSE_COLUMNS = 1024  # elements of a sample up to which the reference is dense
_REFERENCE_TOL, _REFERENCE_VJPS = 1e-8, 500
_RADIUS_TOL, _RADIUS_VJPS = 1e-2, 60


@dataclass(frozen=True)
class StrategyResult:
    """What one strategy's gradient was, and what it cost.

    Attributes:
        strategy: the strategy, as its spec.
        cosine: of dL/dtheta to the reference's.
        relative_error: ||dL/dtheta - reference|| / ||reference||.
        norm: ||dL/dtheta||.
        residual: ||v - (I - J^T) g|| / ||v|| of the g behind it, at h*.
        forward_seconds: median time to attach it to the solved equilibrium.
        backward_seconds: median time from dL/dh to dL/dtheta.
        n_evaluations: calls of F, the solve not counted unless the strategy owns it.
        n_vjp: backward passes through F, the one to the parameters included.
        peak_bytes: most memory it held, forward and backward, above what was there before.
        damped_radius: rho(lam J + (1 - lam) I), the largest of the batch, where it has a `lam`.
        second_order_error: relative error of a second derivative of L, where that was asked for
            and the strategy has one.
        error: what went wrong, and then everything above but `strategy` is None.
    """

    strategy: str
    cosine: float | None = None
    relative_error: float | None = None
    norm: float | None = None
    residual: float | None = None
    forward_seconds: float | None = None
    backward_seconds: float | None = None
    n_evaluations: int | None = None
    n_vjp: int | None = None
    peak_bytes: int | None = None
    damped_radius: float | None = None
    second_order_error: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class GradientReport:
    """What every strategy does on one equilibrium; `print` shows a table.

    Attributes:
        name: of the equilibrium.
        batch_size: samples; None where they are one coupled system.
        elements: of the state, all samples together.
        parameters: elements of the parameters that F depends on.
        dtype: of the state.
        device: of the state.
        forward_residual: ||F(h) - h|| / ||F(h)||, the whole batch together.
        nfe: evaluations of F that the solve took; None where not known.
        batch_dim: what the context says of samples, see `Context.batch_dim`.
        samples_are_coupled: whether F mixes the samples along that dimension.
        map_difference: ||F(h) - F(h)|| / ||F(h)|| of two evaluations at the same state, zero where
            rounding can account for it.
        map_reasons: what in F draws at random or updates buffers, where there is a difference.
        reference: the method of the reference gradient.
        reference_residual: ||v - (I - J^T) g|| / ||v|| of the reference itself.
        reference_norm: ||dL/dtheta|| of the reference.
        radius: rho(J), the largest of the batch.
        damped_radii: rho(lam J + (1 - lam) I) for each lam, the largest of the batch.
        results: one a strategy.
        recommendation: what follows, in sentences.
    """

    name: str
    batch_size: int | None
    elements: int
    parameters: int
    dtype: str
    device: str
    forward_residual: float
    nfe: int | None
    batch_dim: int | str | None
    samples_are_coupled: bool
    map_difference: float
    map_reasons: list[str]
    reference: str
    reference_residual: float
    reference_norm: float
    radius: float
    damped_radii: dict[float, float]
    results: list[StrategyResult]
    recommendation: list[str]

    def __str__(self) -> str:
        from .render import as_text

        return as_text(self)

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers in types that JSON has; NaN and infinity become None."""
        return dict(_plain(asdict(self)))

    def save_json(self, path: str | Path) -> None:
        """Write all numbers to a file, whole or not at all."""
        write_whole(path, json.dumps(self.to_dict(), indent=1).encode())

    def save_html(self, path: str | Path) -> None:
        """Write one self-contained page with tables and plots, whole or not at all.

        Raises:
            ImportError: without matplotlib.
        """
        from .html import page

        write_whole(path, page([self], self.name).encode())


def gradient_report(
    func: Callable[[State], State],
    equilibrium: State,
    loss: Callable[[State], Tensor],
    params: Iterable[Tensor],
    grads: Sequence[Spec] = DEFAULT_GRADS,
    *,
    context: Context | None = None,
    repeats: int = 3,
    second_order: bool = False,
) -> GradientReport:
    """Measure strategies on your own equilibrium against a reference gradient.

    Random state, and the buffers of all modules that run in F, are left as they were.

    The reference is a dense solve up to 1024 elements a sample, else GMRES to a relative residual
    of 1e-8 (or ten roundings of the state's dtype, if that is more), and if that stalls again
    dense where the matrices fit into 1 GiB. Its own residual is shown.

    A `func` that was compiled is measured as it was written, since compiled code is differentiated
    once; so are the times.

    Args:
        func: F, from a state to a state of the same structure, as for `dpp.attach`.
        equilibrium: h*, detached.
        loss: from a state to a scalar.
        params: tensors to differentiate with respect to: those that F captures, or is built
            from. Only the gradient that flows through the equilibrium counts; nothing is added to
            their `.grad`.
        grads: specs of the strategies.
        context: what the strategies may know, such as `batch_dim`, which is found out by default.
        repeats: timed runs of each strategy, interleaved; their medians are reported.
        second_order: whether to compare second derivatives as well: the gradient of <dL/dtheta, w>
            for a random w, with that of `ift(higher_order=True)`. Not all strategies have one, and
            that of `upg` and `jfb` is the surrogate's.

    Returns:
        The report: a table when printed, `save_json`, `save_html`.

    Raises:
        ValueError: if a spec, the equilibrium, the loss or `params` is invalid. A strategy that
            fails on the way has its error in its row instead.
    """
    problem = Problem(func, equilibrium, loss, check_params(params), context or Context())
    strategies = [get_strategy(spec) for spec in grads]
    repeats = positive_int("repeats", repeats)
    with Trial(equilibrium):
        report = measure(problem, strategies, repeats, name="equilibrium")
        return _with_second_order(report, problem, strategies) if second_order else report


def measure(
    problem: Problem,
    strategies: Sequence[GradStrategy],
    repeats: int,
    *,
    name: str,
    nfe: int | None = None,
) -> GradientReport:
    """Measure strategies on a problem; see `gradient_report`."""
    if not strategies:
        raise ValueError("grads is empty; expected at least one strategy")
    problem = replace(problem, params=problem.reached())
    problem.cotangent(problem.equilibrium)  # a loss that cannot be used says so now
    told, found = problem.context.batch_dim, problem.inspect()
    problem = problem.settled(found.coupled)
    whole = problem.coupled() if found.coupled else problem
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # residuals are reported instead
        method, reference = solve_reference(whole)
        lams = sorted({*LAMS, *(lam for s in strategies if (lam := _lam(s)))}, reverse=True)
        radii = spectral_radius(
            problem.func,
            problem.equilibrium,
            lams,
            batch_dim=whole.context.batch_dim,
            tol=_RADIUS_TOL,
            max_iter=_RADIUS_VJPS,
        )
        largest = [float(radius.max()) if radius.numel() else 0.0 for radius in radii]
        damped_radii = dict(zip(lams, largest, strict=True))
        results = _results(problem, strategies, reference, damped_radii, repeats)
    packing = Packing(flatten(problem.equilibrium)[0], whole.context.sample_dim)
    report = GradientReport(
        name=name,
        batch_size=packing.batch_size,
        elements=packing.rows * packing.columns,
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
        recommendation=[],
    )
    return replace(report, recommendation=recommend(report))


def solve_reference(problem: Problem) -> tuple[GradStrategy, Gradient]:
    """Return the most exact gradient that the problem's size allows, and its method.

    Small states are solved densely. Larger ones by GMRES; where that stalls, as it does when
    eigenvalues of J surround 1, densely if the matrices fit into memory.
    """
    packing = Packing(flatten(problem.equilibrium)[0], problem.context.sample_dim)
    tol = _reference_tol(packing)
    methods: list[GradStrategy] = [
        IFT(solver="gmres", tol=tol, max_iter=_REFERENCE_VJPS),
        Exact(),
    ]
    if packing.columns <= _DENSE_COLUMNS:
        methods.reverse()
    found: list[tuple[GradStrategy, Gradient]] = []
    for method in methods:
        try:
            gradient = problem.differentiate(method)
        except ValueError:  # too large to be dense
            continue
        found.append((method, gradient))
        if gradient.residual <= POOR_REFERENCE:
            break
    return min(found, key=lambda pair: pair[1].residual)


def _reference_tol(packing: Packing) -> float:
    return max(_REFERENCE_TOL, float(f"{10 * torch.finfo(packing.dtype).eps:.0e}"))


def _results(
    problem: Problem,
    strategies: Sequence[GradStrategy],
    reference: Gradient,
    damped_radii: dict[float, float],
    repeats: int,
) -> list[StrategyResult]:
    rows: list[StrategyResult] = []
    for strategy in strategies:
        try:
            found = problem.differentiate(strategy)
            rows.append(
                StrategyResult(
                    strategy=repr(strategy),
                    cosine=found.cosine(reference),
                    relative_error=found.relative_error(reference),
                    norm=found.norm,
                    residual=found.residual,
                    n_evaluations=found.n_evaluations,
                    n_vjp=found.n_vjp,
                    peak_bytes=peak_bytes(partial(_run, problem, strategy), problem.device),
                    damped_radius=damped_radii.get(_lam(strategy) or math.nan),
                )
            )
        except Exception as error:  # whatever a strategy raises; the others still report
            message = f"{type(error).__name__}: {error}"
            rows.append(StrategyResult(strategy=repr(strategy), error=message))
    times: list[list[tuple[float, float]]] = [[] for _ in strategies]
    for _ in range(repeats):
        for strategy, row, own in zip(strategies, rows, times, strict=True):
            if row.error is None:
                own.append(_run(problem, strategy))
    return [
        replace(
            row,
            forward_seconds=statistics.median(forward for forward, _ in own),
            backward_seconds=statistics.median(backward for _, backward in own),
        )
        if own
        else row
        for row, own in zip(rows, times, strict=True)
    ]


def _with_second_order(
    report: GradientReport, problem: Problem, strategies: Sequence[GradStrategy]
) -> GradientReport:
    problem = replace(problem, params=problem.reached()).settled(report.samples_are_coupled)
    whole = problem.coupled() if report.samples_are_coupled else problem
    exact = IFT(
        tol=_reference_tol(Packing(flatten(whole.equilibrium)[0], None)),
        max_iter=_REFERENCE_VJPS,
        higher_order=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        reference = whole.second_derivative(exact)
        rows = []
        for strategy, row in zip(strategies, report.results, strict=True):
            own = None if row.error else problem.second_derivative(strategy)
            if own is not None and reference is not None:
                error = float((own - reference).norm() / reference.norm())
                row = replace(row, second_order_error=error)
            rows.append(row)
    return replace(report, results=rows)


def _run(problem: Problem, strategy: GradStrategy) -> tuple[float, float]:
    """Differentiate once; return the seconds forward and backward, the loss's own left out."""
    start = now(problem.device)
    attached = problem.attach(strategy)
    forward = now(problem.device) - start
    v = problem.cotangent(attached)
    start = now(problem.device)
    problem.pull_back(attached, v, problem.params)
    return forward, now(problem.device) - start


def _lam(strategy: GradStrategy) -> float | None:
    """Return the damping factor of a strategy that has a fixed one."""
    lam = getattr(strategy, "lam", None)
    return lam if isinstance(lam, float) and 0 < lam <= 1 else None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
