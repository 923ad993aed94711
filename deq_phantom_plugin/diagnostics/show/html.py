"""A report as one self-contained page: nothing is fetched, no script runs."""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from ..._plumbing.extras import require
from ..measure.results import Measurement, StrategyResult
from .text import HEADER, cells, facts, n_columns

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; padding: 0 1rem;
       color: #1b1f24; background: #fff }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
.scroll { overflow-x: auto }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #d8dee4;
         white-space: nowrap }
th:first-child, td:first-child { text-align: left; font-family: ui-monospace, monospace }
td.error { color: #b42318; white-space: normal; text-align: left }
table.facts td { text-align: left; white-space: normal; border: 0; padding: .1rem .7rem .1rem 0 }
figure { display: inline-block; margin: 0 1rem 1rem 0; vertical-align: top }
figure img { width: 23rem; max-width: 100% }
figcaption { font-size: 13px; color: #57606a; max-width: 23rem }
li { margin: .3rem 0; max-width: 60rem }
"""

# Okabe and Ito's palette, which colour-blind readers can tell apart; markers say it once more.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"


def page(reports: Sequence[tuple[Measurement, Sequence[str]]], title: str) -> str:
    """Return the page.

    Args:
        reports: what was measured, and the advice on it; one a section.
        title: of the page.

    Raises:
        ImportError: without matplotlib.
    """
    return document(title, "\n".join(_section(report, advice) for report, advice in reports))


def document(title: str, body: str) -> str:
    """Return a page around a body of HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f'<link rel="icon" href="data:,"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{html.escape(title)}</h1>\n{body}\n"
        "</body></html>\n"
    )


def _section(report: Measurement, advice: Sequence[str]) -> str:
    known = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
        for name, value in facts(report)
    )
    head = "".join(f"<th>{html.escape(name)}</th>" for name in HEADER[: n_columns(report)])
    rows = "".join(_row(result, n_columns(report)) for result in report.results)
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in advice)
    return (
        f'<h2>{html.escape(report.name)}</h2>\n<table class="facts">{known}</table>\n'
        f"<ul>{items}</ul>\n"
        f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>\n{_figures(report)}'
    )


def _row(result: StrategyResult, n: int) -> str:
    name = html.escape(result.strategy)
    if result.error is not None:
        span = n - 1
        error = html.escape(result.error)
        return f'<tr><td>{name}</td><td class="error" colspan="{span}">{error}</td></tr>'
    return "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(result)[:n]) + "</tr>"


def _figures(report: Measurement) -> str:
    usable = [r for r in report.results if r.error is None and r.backward_seconds is not None]
    figures = [
        figure(
            "rho(lam J + (1 - lam) I), the damped map's spectral radius, against lam. Below 1 "
            "phantom gradients converge, the lower the faster.",
            lambda axes: _draw_radii(axes, report),
        )
    ]
    if usable:
        figures = [
            figure(
                "Relative error of dL/dtheta against the time it takes, forward and backward: "
                "lower left is better.",
                lambda axes: _draw_errors(axes, usable),
            ),
            *figures,
            figure("Peak memory, forward and backward.", lambda axes: _draw_memory(axes, usable)),
        ]
    return "\n".join(figures)


def figure(caption: str, draw: Callable[[Any], None]) -> str:
    """Return a figure whose axes a function draws on.

    Raises:
        ImportError: without matplotlib.
    """
    matplotlib = require("matplotlib", "viz")
    backend = require("matplotlib.backends.backend_svg", "viz")
    figures = require("matplotlib.figure", "viz")
    with matplotlib.rc_context({"svg.hashsalt": "deq-phantom", "font.size": 9}):
        figure = figures.Figure(figsize=(4.6, 3.4), layout="constrained")
        draw(figure.add_subplot())
        image = io.BytesIO()
        backend.FigureCanvasSVG(figure).print_svg(image, metadata={"Date": None})
    data = base64.b64encode(image.getvalue()).decode()
    text = html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _draw_errors(axes: Any, results: Sequence[StrategyResult]) -> None:
    floor = 1e-16  # a method that is its own reference has an error of zero
    labels = _labels(results)
    for i, r in enumerate(results):
        seconds = (r.forward_seconds or 0) + (r.backward_seconds or 0)
        axes.scatter(
            [1e3 * seconds],
            [max(r.relative_error or 0, floor)],
            color=COLOURS[i % len(COLOURS)],
            marker=_MARKERS[i % len(_MARKERS)],
            label=labels[i],
            zorder=3,
        )
    axes.set(xlabel="ms", ylabel="relative error", xscale="log", yscale="log")
    axes.xaxis.set_minor_formatter("")  # within one decade they would cover one another
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _draw_radii(axes: Any, report: Measurement) -> None:
    lams = sorted(report.damped_radii)
    axes.plot(lams, [report.damped_radii[lam] for lam in lams], "o-", color=COLOURS[0])
    axes.axhline(1, color=COLOURS[1], linestyle="--")
    axes.set(xlabel="lam", ylabel="spectral radius")
    axes.grid(alpha=0.3)


def _draw_memory(axes: Any, results: Sequence[StrategyResult]) -> None:
    positions = range(len(results))
    axes.barh(
        positions,
        [(r.peak_bytes or 0) / 2**20 for r in results],
        color=[COLOURS[i % len(COLOURS)] for i in positions],
    )
    axes.set_yticks(positions, _labels(results), fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="MiB")
    axes.grid(alpha=0.3, axis="x")


def _labels(results: Sequence[StrategyResult], width: int = 28) -> list[str]:
    """Return names without arguments, and with them where a name alone is not enough."""
    names = [r.strategy.partition("(")[0] for r in results]
    return [
        name if names.count(name) == 1 else textwrap.shorten(r.strategy, width, placeholder="…")
        for name, r in zip(names, results, strict=True)
    ]
