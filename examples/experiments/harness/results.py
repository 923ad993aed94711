"""Writes the results of all runs of an experiment: a table, JSON, CSV and a plot.

An experiment describes its table by `Column`s and its plot by `Curve`s. `load_records` reads the
records of all runs in a folder, and `write` writes the files.
"""

from __future__ import annotations

import csv
import datetime
import io
import json
import math
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from deq_phantom_plugin._plumbing.extras import require
from deq_phantom_plugin._plumbing.output import text_table, write_whole

from . import choices
from .training import Record

FEW = 4  # up to so many repeats, the plot shows each as a line
SHORT = 20  # up to so many points, the points of a curve are marked
TIMES = "step seconds, taken in turn"  # the key of the step times in results.json


def mean_and_deviation(values: Sequence[float], text: str) -> str:
    """Return the mean as text, with the standard deviation if there are several values."""
    if not values or any(map(math.isnan, values)):
        return "-"
    mean = text.format(statistics.fmean(values))
    return f"{mean} ± {text.format(statistics.stdev(values))}" if len(values) > 1 else mean


def median_of(values: Sequence[float], text: str) -> str:
    """Return the median as text; infinite values count, and it is said how many are finite."""
    if not values or any(map(math.isnan, values)):
        return "-"
    middle = statistics.median_low(values)
    finite = sum(map(math.isfinite, values))
    never = f" ({finite} of {len(values)} there)" if finite < len(values) else ""
    return (text.format(middle) if math.isfinite(middle) else "not there") + never


@dataclass(frozen=True)
class Column:
    """A column of the table, with one number per run and repeat (seed or fold).

    Attributes:
        title: the header of the column.
        of: returns the number of a finished record.
        text: the format of a number.
        over: returns the text of a cell from the numbers of all repeats and from `text`:
            `mean_and_deviation` or `median_of`.
    """

    title: str
    of: Callable[[Record], float]
    text: str = "{:.1f}"
    over: Callable[[Sequence[float], str], str] = mean_and_deviation


@dataclass(frozen=True)
class Curve:
    """A panel of the plot, which shows a value of the history against the steps or the seconds.

    Attributes:
        y: the key of the value in the history.
        label: the label of the y axis.
        x: the key of the x axis in the history: "step" or "seconds".
        log: whether the y axis is logarithmic.
        scale: the factor by which the value is multiplied.
    """

    y: str
    label: str
    x: str = "step"
    log: bool = False
    scale: float = 1.0


def last(key: str, scale: float = 1.0) -> Callable[[Record], float]:
    """Return a function that reads a key from the last evaluation of a record that has it."""

    def of(record: Record) -> float:
        values = [row[key] for row in record.history if key in row]
        return scale * values[-1] if values else math.nan

    return of


def best(
    key: str,
    scale: float = 1.0,
    choose: Callable[..., dict[str, float]] = max,
    by: str | None = None,
) -> Callable[[Record], float]:
    """Return a function that reads the best value of a key over all evaluations of a record.

    Args:
        key: the key in the history.
        scale: a factor of the result.
        choose: `max` or `min`, whichever is best.
        by: another key, whose best value selects the evaluation; `key` itself if None.
    """

    def of(record: Record) -> float:
        rows = [row for row in record.history if key in row]
        return scale * choose(rows, key=lambda row: row[by or key])[key] if rows else math.nan

    return of


def mean(key: str, scale: float = 1.0) -> Callable[[Record], float]:
    """Return a function that computes the mean of a key over all evaluations that have it."""

    def of(record: Record) -> float:
        values = [row[key] for row in record.history if key in row]
        return scale * statistics.fmean(values) if values else math.nan

    return of


def milliseconds(record: Record) -> float:
    """Return the milliseconds of a step: the median of the medians between evaluations."""
    times = [row["ms_per_step"] for row in record.history if "ms_per_step" in row]
    return statistics.median(times) if times else math.nan


def load_records(folder: Path) -> list[Record]:
    """Return the records of all runs in a folder, sorted by name and repeat."""
    found = [Record(**json.loads(path.read_text())) for path in folder.glob("*/*/record.json")]
    return sorted(found, key=lambda record: (record.name, record.repeat))


def finished_records(path: Path) -> list[Record]:
    """Return the records of the finished runs in a `results.json` of another command.

    Raises:
        SystemExit: if it cannot be read as such a file.
    """
    try:
        content = json.loads(path.read_text())
        found = [Record(**{"environment": content["environment"], **r}) for r in content["runs"]]
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise SystemExit(
            f"--also {path}: {type(error).__name__}: {error}; expected a results.json"
        ) from None
    return [record for record in found if record.is_done and record.error is None]


def load_times(folder: Path) -> dict[str, list[float]]:
    """Return the step times in the results of a folder; empty if there are no results."""
    path = folder / "results.json"
    if not path.is_file():
        return {}
    found: dict[str, list[float]] = json.loads(path.read_text())[TIMES]
    return found


def groups(records: Sequence[Record], order: Sequence[str]) -> dict[str, list[Record]]:
    """Return the records of each run by its name, in this order; other runs come last."""
    names = [*order, *sorted({record.name for record in records} - set(order))]
    by_name = {name: [r for r in records if r.name == name] for name in names}
    return {name: found for name, found in by_name.items() if found}


def rows(
    records: Sequence[Record],
    columns: Sequence[Column],
    order: Sequence[str],
    times: dict[str, list[float]],
) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table.

    Args:
        records: the records of all runs.
        columns: the columns.
        order: the order of the runs, by name.
        times: the seconds per step of each run, timed in turn; empty if they were not timed.
    """
    header = ["run", *(column.title for column in columns), "ms/step"]
    header += [*(["ms/step in turn"] if times else []), "steps", "runs"]
    table = []
    for name, found in groups(records, order).items():
        ended = [record for record in found if record.error is None and record.is_done]
        cells = [c.over([c.of(r) for r in ended], c.text) for c in columns]
        median = [statistics.median(map(milliseconds, ended))] if ended else []
        cells.append(mean_and_deviation(median, "{:.1f}"))
        if times:
            cells.append(f"{1e3 * statistics.median(times[name]):.1f}" if name in times else "")
        steps = sorted({record.steps for record in found})
        cells.append(str(steps[0]) if len(steps) == 1 else f"{steps[0]} to {steps[-1]}")
        failed = sum(record.error is not None for record in found)
        notes = [f"{failed} failed"] if failed else []
        unfinished = len(found) - len(ended) - failed
        notes += [f"{unfinished} unfinished"] if unfinished else []
        cells.append(f"{len(ended)}" + (f" ({'; '.join(notes)})" if notes else ""))
        table.append([name, *cells])
    return header, table


def write(
    folder: Path,
    title: str,
    records: Sequence[Record],
    columns: Sequence[Column],
    curves: Sequence[Curve],
    order: Sequence[str],
    times: dict[str, list[float]],
) -> str:
    """Write the results of runs into a folder, and return the table as text.

    `results.json` has everything, `table.md` the means, and `runs.csv` the columns of each seed or
    fold. `curves.png` is the plot. `choices.png` shows the choices of `auto`, if there are any.

    Args:
        folder: the folder.
        title: the title of the plots.
        records: the records of the runs.
        columns: the columns of the table.
        curves: the panels of the plot.
        order: the order of the runs, by name.
        times: see `rows`.
    """
    header, body = rows(records, columns, order, times)
    content = {
        "title": title,
        "environment": environment(),
        TIMES: times,
        "runs": [asdict(record) for record in records],
    }
    finite = json.loads(json.dumps(content), parse_constant=lambda _: None)
    write_whole(folder / "results.json", json.dumps(finite, indent=1).encode())
    lines = [header, ["---"] * len(header), *body]
    write_whole(folder / "table.md", "".join(f"| {' | '.join(r)} |\n" for r in lines).encode())
    write_whole(folder / "runs.csv", each_run(records, columns, order).encode())
    write_whole(folder / "curves.png", plot(records, curves, order, title))
    if chosen := choices.plot(records, title):
        write_whole(folder / "choices.png", chosen)
    return text_table(header, body)


def each_run(records: Sequence[Record], columns: Sequence[Column], order: Sequence[str]) -> str:
    """Return the columns of each seed or fold as CSV."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    titles = (column.title for column in columns)
    lines.writerow(["run", "repeat", *titles, "steps", "of", "seconds", "error"])
    for found in groups(records, order).values():
        for r in found:
            values = [f"{c.of(r):.6g}" for c in columns]
            ends = [r.steps, r.total, f"{r.seconds:.1f}", r.error or ""]
            lines.writerow([r.name, r.repeat, *values, *ends])
    return text.getvalue()


def environment() -> dict[str, Any]:
    """Return the date, the hardware and the version of PyTorch, on which times depend."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.date.today().isoformat(),
        "gpu": gpu,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def plot(
    records: Sequence[Record], curves: Sequence[Curve], order: Sequence[str], title: str
) -> bytes:
    """Return a PNG with one panel per curve and one colour per run.

    A bold line is the mean over the repeats of a run. The repeats are thin lines, or a band of
    their standard deviation if there are more than `FEW`.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    require("matplotlib", "viz")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(curves) + 2, 3.8), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, curve in zip(panels, curves, strict=True):
        for number, (name, found) in enumerate(groups(records, order).items()):
            color = f"C{number % 10}"
            lines = [
                [
                    (row[curve.x], curve.scale * row[curve.y])
                    for row in record.history
                    if curve.y in row
                ]
                for record in found
            ]
            lines = [line for line in lines if line]  # runs without an evaluation have no line
            length = min(map(len, lines), default=0)
            points = [list(zip(*(line[i] for line in lines), strict=True)) for i in range(length)]
            x, y = ([statistics.fmean(point[j]) for point in points] for j in (0, 1))
            if len(lines) <= FEW:
                for line in lines:
                    kind = ".-" if length <= SHORT else "-"
                    axes.plot(*zip(*line, strict=True), kind, c=color, linewidth=0.7, alpha=0.4)
            else:
                deviations = [statistics.stdev(point[1]) for point in points]
                low, high = (
                    [m + sign * d for m, d in zip(y, deviations, strict=True)] for sign in (-1, 1)
                )
                axes.fill_between(x, low, high, color=color, alpha=0.1, linewidth=0)
            kind = "-" if number < 10 else "--"
            axes.plot(x, y, kind, c=color, linewidth=1.8, label=name, zorder=3)
        axes.set(xlabel={"seconds": "seconds of training"}.get(curve.x, curve.x))
        axes.set(ylabel=curve.label, yscale="log" if curve.log else "linear")
        axes.grid(alpha=0.3)
    handles = panels[0].get_legend_handles_labels()
    panels[-1].legend(*handles, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(title, fontsize=10)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
