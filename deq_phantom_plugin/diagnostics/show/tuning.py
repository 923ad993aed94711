"""The result of `tune`, as text for the terminal and as a page with figures."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from functools import partial
from typing import Any

from ..._plumbing.output import text_table
from ...strategies.candidates import Candidate
from ..measure.results import TunedEquilibrium
from .figures import COLOURS, SMALL_TEXT, around, figure, log_axis
from .html import document

_HEADER = ("strategy", "cosine", "cost", "F", "VJP")
_DEAREST = 1e6  # a cost above this stands for a solve that failed, and is not drawn
_FLOOR = 1e-9  # the least 1 - cosine that is drawn, since the axis is logarithmic


def tuning_text(title: str, equilibria: Sequence[TunedEquilibrium], spec: str) -> str:
    """Return one table per equilibrium, and the spec to copy."""
    lines = [title]
    for found in equilibria:
        lines += ["", found.name, "=" * len(found.name)]
        if rows := _rows(found):
            lines += [text_table(_HEADER, rows), ""]
        lines += textwrap.wrap(_sentence(found), 100)
    return "\n".join([*lines, "", f'grad="{spec}"'])


def tuning_page(title: str, equilibria: Sequence[TunedEquilibrium], spec: str) -> str:
    """Return one self-contained page.

    Raises:
        ImportError: without matplotlib.
    """
    parts = [f"<p>grad=<code>{html.escape(spec)}</code></p>"]
    for found in equilibria:
        parts += [f"<h2>{html.escape(found.name)}</h2>", f"<p>{html.escape(_sentence(found))}</p>"]
        if rows := _rows(found):
            head = "".join(f"<th>{name}</th>" for name in _HEADER)
            body = "".join(
                "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
                for row in rows
            )
            parts.append(f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>')
            caption = (
                "1 - cosine against the cost in evaluations of F, where a backward pass counts as "
                "two: lower left is better. The ring marks the method that was chosen."
            )
            parts.append(figure(caption, partial(_draw, found)))
    return document(title, "\n".join(parts))


def _sentence(found: TunedEquilibrium) -> str:
    return f"{found.spec}, of {found.samples} samples: {found.why}."


def _rows(found: TunedEquilibrium) -> list[tuple[str, ...]]:
    """Return rows of the chosen method, and of those that none beats in both cost and cosine."""
    shown = [c for c in found.candidates if c.spec == found.spec]
    best = -1.0
    for candidate in sorted(found.candidates, key=lambda c: (c.cost, -c.cosine)):
        if candidate.cosine > best + 1e-6:
            best = candidate.cosine
            shown += [candidate] if candidate not in shown else []
    return [
        (
            f"{c.spec} *" if c.spec == found.spec else c.spec,
            f"{c.cosine:.4f}",
            f"{c.cost:g}",
            f"{c.evaluations:g}",
            f"{c.products:g}",
        )
        for c in sorted(shown, key=lambda c: c.cost)
    ]


def _draw(found: TunedEquilibrium, axes: Any) -> None:
    """Draw all methods, a colour per name, and a ring around the chosen one."""
    shown = [c for c in found.candidates if 0 < c.cost < _DEAREST]
    for i, kind in enumerate(sorted({_kind(c) for c in shown})):
        own = [c for c in shown if _kind(c) == kind]
        colour = COLOURS[i % len(COLOURS)]
        axes.scatter([c.cost for c in own], _missing(own), s=8, color=colour, label=kind)
    chosen = [c for c in shown if c.spec == found.spec][:1]
    axes.scatter(
        [c.cost for c in chosen],
        _missing(chosen),
        s=90,
        facecolors="none",
        edgecolors="black",
        label="chosen",
    )
    axes.set(xlabel="cost", ylabel="1 - cosine")
    if shown:
        log_axis(axes, "x", *around([c.cost for c in shown]))
        log_axis(axes, "y", *around(_missing(shown)))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=SMALL_TEXT)


def _kind(candidate: Candidate) -> str:
    return candidate.spec.partition("(")[0]


def _missing(candidates: Sequence[Candidate]) -> list[float]:
    """Return 1 - cosine of each candidate, at least `_FLOOR`."""
    return [max(1 - c.cosine, _FLOOR) for c in candidates]
