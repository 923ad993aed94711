"""The figures of a report's page.

matplotlib draws each figure as SVG, which is embedded into the page. A page then needs no other
file.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

from ..._plumbing.extras import require
from ..measure.results import Measurement, StrategyResult

# The palette of Okabe and Ito, which colour-blind readers can tell apart. Markers differ as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"

# A page shows a figure in its own size, so a size in points is right beside the page's 12 points.
INCHES = (4.4, 3.4)
TEXT, SMALL_TEXT = 11, 9.5  # points

_SMALLEST, _LARGEST = 1e-6, 1e2  # errors outside of these stand on a dashed line


def figure(caption: str, draw: Callable[[Any], None]) -> str:
    """Return a figure as HTML.

    Args:
        caption: the text below the figure.
        draw: draws on the axes that it is given.

    Raises:
        ImportError: without matplotlib.
    """
    matplotlib = require("matplotlib", "viz")
    backend = require("matplotlib.backends.backend_svg", "viz")
    figures = require("matplotlib.figure", "viz")
    with matplotlib.rc_context({"svg.hashsalt": "deq-phantom", "font.size": TEXT}):
        figure = figures.Figure(figsize=INCHES, layout="constrained")
        draw(figure.add_subplot())
        image = io.BytesIO()
        backend.FigureCanvasSVG(figure).print_svg(image, metadata={"Date": None})
    data = base64.b64encode(image.getvalue()).decode()
    text = html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def of_report(report: Measurement) -> str:
    """Return the figures of a report as HTML: radii always, errors and memory if measured."""
    usable = [r for r in report.results if r.error is None and r.backward_seconds is not None]
    radii = figure(
        "rho(lam J + (1 - lam) I), the damped map's spectral radius, against lam. Below 1 "
        "phantom gradients converge; the lower the radius, the faster.",
        lambda axes: draw_radii(axes, report),
    )
    if not usable:
        return radii
    found = [radii, figure("Peak memory, forward and backward.", lambda a: draw_memory(a, usable))]
    if report.reference_is_good and not all(math.isnan(_error(r)) for r in usable):
        caption = (
            "Relative error of dL/dtheta against the time that it takes, forward and backward: "
            "lower left is better. Errors "
            f"below {_SMALLEST:g} and above {_LARGEST:g} stand on dashed lines."
        )
        found.insert(0, figure(caption, lambda axes: draw_errors(axes, usable)))
    return "\n".join(found)


def draw_errors(axes: Any, results: Sequence[StrategyResult]) -> None:
    """Draw relative errors against times.

    A method that is its own reference has an error of rounding, and a series that diverges has a
    huge one. On the axis these would leave the others no room. So they stand on dashed lines at the
    edge, and the legend gives their numbers.
    """
    errors = [_error(r) for r in results]
    seen = [error for error in errors if _SMALLEST <= error <= _LARGEST]
    bottom, top = min(seen, default=1.0) / 4, max(seen, default=1.0) * 4
    times = [1e3 * ((r.forward_seconds or 0) + (r.backward_seconds or 0)) for r in results]
    for i, (x, error, name) in enumerate(zip(times, errors, labels(results), strict=True)):
        if math.isnan(error):
            continue
        y = bottom if error < _SMALLEST else top if error > _LARGEST else error
        axes.scatter(
            [x],
            [y],
            color=COLOURS[i % len(COLOURS)],
            marker=_MARKERS[i % len(_MARKERS)],
            label=name if y == error else f"{name}: {error:.0e}",
            zorder=3,
        )
    axes.set(xlabel="ms", ylabel="relative error")
    low, high = around(seen or [1.0])
    lines = [bottom] if any(error < _SMALLEST for error in errors) else []
    lines += [top] if any(error > _LARGEST for error in errors) else []
    for y in lines:
        axes.axhline(y, color="grey", linestyle="--", linewidth=1)
    log_axis(axes, "x", *around(times))
    log_axis(axes, "y", min([low, *lines]), max([high, *lines]))
    # A dashed line gets no tick, since the errors on it have other values.
    ticks = [tick for tick in axes.get_yticks() if bottom * 1.01 < tick < top / 1.01]
    axes.set_yticks(ticks if seen else [])
    axes.set_ylim(min([low, *(y / 1.5 for y in lines)]), max([high, *(y * 1.5 for y in lines)]))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=SMALL_TEXT)


def _error(result: StrategyResult) -> float:
    return math.nan if result.relative_error is None else result.relative_error


def log_axis(axes: Any, which: str, low: float, high: float) -> None:
    """Make the axis "x" or "y" logarithmic from `low` to `high`, with the ticks of `log_ticks`."""
    axes.set(**{f"{which}scale": "log"})
    axes.set(**{f"{which}lim": (low, high), f"{which}ticks": log_ticks(low, high)})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_ticks([], minor=True)


def around(values: Sequence[float]) -> tuple[float, float]:
    """Return limits of a logarithmic axis that shows these positive numbers with some room."""
    low, high = min(values), max(values)
    room = max((high / low) ** 0.1, 1.4)
    return low / room, high * room


def log_ticks(low: float, high: float) -> list[float]:
    """Return at least three round numbers on a logarithmic axis, and few enough to be read.

    Args:
        low: where the axis begins.
        high: where it ends.
    """
    decades = math.log10(high / low)
    if decades < 1:  # evenly spaced, as on a linear axis
        step = (high - low) / 6
        unit = 10.0 ** math.floor(math.log10(step))
        step = next(unit * nice for nice in (1, 2, 5, 10) if unit * nice >= step)
        first, last = math.ceil(low / step), math.floor(high / step)
        return [n * step for n in range(first, last + 1)]
    every = max(1, round(decades / 6))
    digits = (1, 2, 5) if decades < 2 else (1, 3) if decades < 3 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**power for power in powers if power % every == 0 for digit in digits]
    return [tick for tick in ticks if low <= tick <= high]


def draw_radii(axes: Any, report: Measurement) -> None:
    """Draw the damped map's radius over lam."""
    lams = sorted(report.damped_radii)
    axes.plot(lams, [report.damped_radii[lam] for lam in lams], "o-", color=COLOURS[0])
    axes.axhline(1, color=COLOURS[1], linestyle="--")
    axes.set(xlabel="lam", ylabel="spectral radius")
    axes.grid(alpha=0.3)


def draw_memory(axes: Any, results: Sequence[StrategyResult]) -> None:
    """Draw one bar of peak memory per method."""
    positions = range(len(results))
    axes.barh(
        positions,
        [(r.peak_bytes or 0) / 2**20 for r in results],
        color=[COLOURS[i % len(COLOURS)] for i in positions],
    )
    axes.set_yticks(positions, labels(results), fontsize=SMALL_TEXT)
    axes.invert_yaxis()
    axes.set(xlabel="MiB")
    axes.grid(alpha=0.3, axis="x")


def labels(results: Sequence[StrategyResult], width: int = 24) -> list[str]:
    """Return names of methods: without arguments if the name is unique, else with them.

    Args:
        results: the rows of the report.
        width: the largest number of characters of a name with arguments.
    """
    names = [r.label.partition("(")[0] for r in results]
    return [
        name if names.count(name) == 1 else _cut(r.label, width)
        for name, r in zip(names, results, strict=True)
    ]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
