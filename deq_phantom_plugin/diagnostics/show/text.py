"""A report as text for the terminal; a page has the same words and numbers."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from ..._plumbing.output import text_table
from ..measure.results import Measurement, StrategyResult

HEADER = (
    "strategy",
    "cosine",
    "rel. error",
    "norm",
    "residual",
    "forward ms",
    "backward ms",
    "F",
    "VJP",
    "peak MiB",
    "rho damped",
    "2nd order",
)


def cells(result: StrategyResult) -> list[str]:
    """Return a row under `HEADER`; "-" for what is not known."""

    def number(value: float | None, form: str, scale: float = 1.0) -> str:
        return "-" if value is None else format(scale * value, form)

    return [
        result.strategy,
        number(result.cosine, ".4f"),
        number(result.relative_error, ".2e"),
        number(result.norm, ".3e"),
        number(result.residual, ".1e"),
        number(result.forward_seconds, ".3g", 1e3),
        number(result.backward_seconds, ".3g", 1e3),
        number(result.n_evaluations, "d", 1),
        number(result.n_vjp, "d", 1),
        number(result.peak_bytes, ".3g", 2**-20),
        number(result.damped_radius, ".3f"),
        number(result.second_order_error, ".1e"),
    ]


def n_columns(report: Measurement) -> int:
    """Return how many columns there are: the last only where it was measured."""
    measured = any(result.second_order_error is not None for result in report.results)
    return len(HEADER) if measured else len(HEADER) - 1


def facts(report: Measurement) -> list[tuple[str, str]]:
    """Return what a report says of the equilibrium itself, as names and values."""
    samples = (
        f"{report.batch_size} samples, " if report.batch_size is not None else "samples coupled, "
    )
    solve = "" if report.nfe is None else f" after {report.nfe} evaluations of F"
    return [
        (
            "state",
            f"{samples}{report.elements:,} elements, {report.dtype} on {report.device}; "
            f"{report.parameters:,} parameters",
        ),
        ("forward solve", f"relative residual {report.forward_residual:.1e}{solve}"),
        (
            "reference",
            f"{report.reference}, residual {report.reference_residual:.1e}, gradient norm "
            f"{report.reference_norm:.3e}",
        ),
        ("rho(dF/dh)", f"{report.radius:.3f}"),
        (
            "damped, by lam",
            "  ".join(f"{lam:g}: {radius:.3f}" for lam, radius in report.damped_radii.items()),
        ),
    ]


def as_text(report: Measurement, advice: Sequence[str]) -> str:
    """Return a report as a table, with what it was measured on above and advice below."""
    known = facts(report)
    width = max(len(name) for name, _ in known)
    lines = [report.name, "=" * len(report.name)]
    lines += [f"{name:{width}}  {value}" for name, value in known]
    working = [cells(result) for result in report.results if result.error is None]
    if working:
        n = n_columns(report)
        lines += ["", text_table(HEADER[:n], [row[:n] for row in working])]
    for result in report.results:
        if result.error is not None:
            lines += ["", f"{result.strategy} failed: {result.error}"]
    lines.append("")
    for sentence in advice:
        lines += textwrap.wrap(sentence, 100, initial_indent="* ", subsequent_indent="  ")
    return "\n".join(lines)
