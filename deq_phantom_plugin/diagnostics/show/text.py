"""A report as text for the terminal.

The HTML page (`html`) takes its words and numbers from here, too.
"""

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


BUSY = 2.0
"""The longest timed run over the shortest one above which times are said to be uncertain."""


def cells(result: StrategyResult, report: Measurement) -> list[str]:
    """Return a strategy's row of the table, one cell per column; "-" for what is not known."""

    def number(value: float | None, form: str, scale: float = 1.0) -> str:
        return "-" if value is None else format(scale * value, form)

    compared = report.reference_is_good
    row = [
        result.label,
        number(result.cosine if compared else None, ".4f"),
        number(result.relative_error if compared else None, ".2e"),
        number(result.norm, ".3e"),
        number(result.residual, ".1e"),
        number(result.forward_seconds, ".3g", 1e3),
        number(result.backward_seconds, ".3g", 1e3),
        number(result.n_evaluations, "d", 1),
        number(result.n_vjp, "d", 1),
        number(result.peak_bytes, ".3g", 2**-20),
        number(result.damped_radius, ".3f"),
        number(result.second_order_error if compared else None, ".1e"),
    ]
    return row[: n_columns(report)]


def n_columns(report: Measurement) -> int:
    """Return the number of columns. The last one is there only if second order was measured."""
    measured = any(result.second_order_error is not None for result in report.results)
    return len(HEADER) if measured else len(HEADER) - 1


def facts(report: Measurement) -> list[tuple[str, str]]:
    """Return what a report says about the equilibrium itself, as pairs (name, value)."""
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
    ]


def damped(report: Measurement) -> list[tuple[str, ...]]:
    """Return two rows: the values of lam, and the spectral radius of the damped map at each."""
    return [
        ("damped by lam", *(f"{lam:g}" for lam in report.damped_radii)),
        ("has rho", *(f"{radius:.3f}" for radius in report.damped_radii.values())),
    ]


def notes(report: Measurement) -> list[str]:
    """Return the notes below the table."""
    found = []
    if not report.reference_is_good:
        found.append(
            f"No cosine and no error: the reference itself has a residual of "
            f"{report.reference_residual:.1e}, so there is no exact gradient to compare with."
        )
    spread = max((result.time_spread or 1.0 for result in report.results), default=1.0)
    if spread > BUSY:
        found.append(
            f"Times are uncertain: runs of one method differ by a factor of up to {spread:.1f}. "
            "Perhaps other work was running. Ask for more timed runs: repeats=."
        )
    return found


def as_text(report: Measurement, advice: Sequence[str]) -> str:
    """Return a report as text: facts on the equilibrium, the table, errors, and advice."""
    known, (lams, radii) = facts(report), damped(report)
    width = max(len(name) for name, *_ in [*known, lams, radii])
    lines = [report.name, "=" * len(report.name)]
    lines += [f"{name:{width}}  {value}" for name, value in known]
    for name, *values in (lams, radii):
        lines.append(f"{name:{width}}" + "".join(f"{value:>7}" for value in values))
    working = [cells(result, report) for result in report.results if result.error is None]
    if working:
        lines += ["", text_table(HEADER[: n_columns(report)], working)]
        for note in notes(report):
            lines += textwrap.wrap(note, 100)
    for result in report.results:
        if result.error is not None:
            lines += ["", f"{result.label} failed: {result.error}"]
    lines.append("")
    for sentence in advice:
        lines += textwrap.wrap(sentence, 100, initial_indent="* ", subsequent_indent="  ")
    return "\n".join(lines)
