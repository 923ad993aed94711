"""A report as one self-contained HTML page. The page fetches nothing and runs no script."""

from __future__ import annotations

import html
from collections.abc import Sequence

from ..measure.results import Measurement, StrategyResult
from . import figures
from .text import HEADER, cells, damped, facts, n_columns, notes

# At 1400 pixels there is room for all eleven columns of a report, and for its three figures in a
# row. Only the first column, which has the specs, may break its lines.
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 84rem; padding: 0 1rem;
       color: #1b1f24; background: #fff }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
.scroll { overflow-x: auto }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #d8dee4;
         white-space: nowrap }
th:first-child, td:first-child { text-align: left; font-family: ui-monospace, monospace }
td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 8rem }
td.error { color: #b42318; white-space: normal; text-align: left }
table.facts td { text-align: left; white-space: normal; border: 0; padding: .1rem .7rem .1rem 0 }
table.damped th { font-family: inherit; font-weight: normal; color: #57606a }
figure { display: inline-block; margin: 0 1rem 1rem 0; vertical-align: top; max-width: 26rem }
figure img { max-width: 100% }
figcaption, .note { font-size: 14px; color: #57606a }
li { margin: .3rem 0; max-width: 60rem }
"""


def page(reports: Sequence[tuple[Measurement, Sequence[str]]], title: str) -> str:
    """Return a page with one section per report.

    Args:
        reports: pairs of what was measured, and the advice on it.
        title: the title of the page.

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
    rows = "".join(_row(result, report) for result in report.results)
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in advice)
    below = "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes(report))
    return (
        f'<h2>{html.escape(report.name)}</h2>\n<table class="facts">{known}</table>\n'
        f"{_damped(report)}\n<ul>{items}</ul>\n"
        f'<div class="scroll"><table class="results"><tr>{head}</tr>{rows}</table></div>\n'
        f"{below}{figures.of_report(report)}"
    )


def _damped(report: Measurement) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for name, *cells in damped(report)
    )
    return f'<div class="scroll"><table class="damped">{rows}</table></div>'


def _row(result: StrategyResult, report: Measurement) -> str:
    # Pointing at a spec shows the strategy with all its arguments.
    name = f'<td title="{html.escape(result.strategy)}">{html.escape(result.label)}</td>'
    if result.error is not None:
        span = n_columns(report) - 1
        error = html.escape(result.error)
        return f'<tr>{name}<td class="error" colspan="{span}">{error}</td></tr>'
    numbers = cells(result, report)[1:]
    return f"<tr>{name}{''.join(f'<td>{html.escape(cell)}</td>' for cell in numbers)}</tr>"
