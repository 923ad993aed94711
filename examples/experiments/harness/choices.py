"""Draws which gradient `auto` chose in each run, and at which steps."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence

from deq_phantom_plugin._plumbing.extras import require

from .training import Record


def plot(records: Sequence[Record], title: str) -> bytes | None:
    """Return a PNG with one bar per equilibrium and run, or None if no run has used `auto`.

    A bar covers the steps of its run. Its parts show the spec that was in force.

    Args:
        records: the records of the runs.
        title: the title of the experiment.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    bars = [bar for record in records for bar in _bars(record)]
    if not bars:
        return None
    require("matplotlib", "viz")
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    names = sorted({spec.partition("(")[0] for _, parts in bars for _, _, spec in parts})
    colors = {name: colormaps["Pastel1"](i % 9) for i, name in enumerate(names)}
    figure = Figure(figsize=(11, 1.2 + 0.26 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for height, (_, parts) in enumerate(bars):
        for begin, end, spec in parts:
            color = colors[spec.partition("(")[0]]
            axes.barh(height, end - begin, left=begin, height=0.85, color=color, edgecolor="white")
            axes.text((begin + end) / 2, height, _short(spec), fontsize=6, ha="center", va="center")
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="step", title=f"{title}: what auto chose, k and lam", xmargin=0)
    handles = [Patch(color=color, label=name) for name, color in colors.items()]
    figure.legend(handles=handles, fontsize=8, loc="outside right upper")
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _short(spec: str) -> str:
    """Return a spec in a short form, without the names of its arguments."""
    return spec.replace("k=", "").replace("lam=", "").replace("tol=", "").replace(", ", " ")


def _bars(record: Record) -> list[tuple[str, list[tuple[int, int, str]]]]:
    """Return the label of each equilibrium of a run, with (begin, end, spec) for each choice."""
    names = list(dict.fromkeys(choice["equilibrium"] for choice in record.choices))
    bars = []
    for name in names:
        found = [choice for choice in record.choices if choice["equilibrium"] == name]
        ends = [choice["step"] for choice in found[1:]] + [record.steps]
        parts = [(c["step"], end, c["spec"]) for c, end in zip(found, ends, strict=True)]
        label = f"{record.name} {record.repeat}" + (f" {name}" if len(names) > 1 else "")
        bars.append(
            (label, [_joined(list(g)) for _, g in itertools.groupby(parts, lambda p: p[2])])
        )
    return bars


def _joined(parts: list[tuple[int, int, str]]) -> tuple[int, int, str]:
    """Return one part for consecutive parts with the same spec."""
    return parts[0][0], parts[-1][1], parts[0][2]
