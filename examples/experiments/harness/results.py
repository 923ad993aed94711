"""What all runs of an experiment have shown: a table, JSON, CSV, a plot."""

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

FEW = 4  # repeats that the plot shows one by one
SHORT = 20  # points of a curve that are marked
TIMES = "step seconds, taken in turn"  # key of results.json


def mean_and_deviation(values: Sequence[float], text: str) -> str:
    """Return the mean, and the standard deviation of several."""
    if not values or any(map(math.isnan, values)):
        return "-"
    mean = text.format(statistics.fmean(values))
    return f"{mean} ± {text.format(statistics.stdev(values))}" if len(values) > 1 else mean


def median_of(values: Sequence[float], text: str) -> str:
    """Return the median, of which those that are infinite are part, and of how many it is."""
    if not values or any(map(math.isnan, values)):
        return "-"
    middle = statistics.median_low(values)
    finite = sum(map(math.isfinite, values))
    never = f" ({finite} of {len(values)} there)" if finite < len(values) else ""
    return (text.format(middle) if math.isfinite(middle) else "not there") + never


@dataclass(frozen=True)
class Column:
    """A number of the table, over a run's seeds or folds.

    Attributes:
        title: its header.
        of: from a finished record to the number.
        text: how a number is written.
        over: from the numbers of all seeds or folds, and `text`, to the cell: the mean, and the
            standard deviation of several, or the median.
    """

    title: str
    of: Callable[[Record], float]
    text: str = "{:.1f}"
    over: Callable[[Sequence[float], str], str] = mean_and_deviation


@dataclass(frozen=True)
class Curve:
    """A panel of the plot: one value of the history against another, or against several.

    Attributes:
        y: key of the history.
        label: of its axis.
        x: key of the history: "step" or "seconds".
        log: whether y is on a logarithmic axis.
    """

    y: str
    label: str
    x: str = "step"
    log: bool = False


def last(key: str, scale: float = 1.0) -> Callable[[Record], float]:
    """Return what takes a key from the last evaluation that has it."""

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
    """Return what takes the best value of a key over all evaluations, or the one where `by` is."""

    def of(record: Record) -> float:
        rows = [row for row in record.history if key in row]
        return scale * choose(rows, key=lambda row: row[by or key])[key] if rows else math.nan

    return of


def mean(key: str, scale: float = 1.0) -> Callable[[Record], float]:
    """Return what takes the mean of a key over all evaluations that have it."""

    def of(record: Record) -> float:
        values = [row[key] for row in record.history if key in row]
        return scale * statistics.fmean(values) if values else math.nan

    return of


def milliseconds(record: Record) -> float:
    """Return the median of the medians of a step's time."""
    times = [row["ms_per_step"] for row in record.history if "ms_per_step" in row]
    return statistics.median(times) if times else math.nan


def load_records(folder: Path) -> list[Record]:
    """Return the records of all runs in a folder, sorted by name and repeat."""
    found = [Record(**json.loads(path.read_text())) for path in folder.glob("*/*/record.json")]
    return sorted(found, key=lambda record: (record.name, record.repeat))


def load_times(folder: Path) -> dict[str, list[float]]:
    """Return the step times that `write` wrote into a folder, if it did."""
    path = folder / "results.json"
    if not path.is_file():
        return {}
    found: dict[str, list[float]] = json.loads(path.read_text())[TIMES]
    return found


def groups(records: Sequence[Record], order: Sequence[str]) -> dict[str, list[Record]]:
    """Return the records of each run, in an order; those it does not name come last."""
    names = [*order, *sorted({record.name for record in records} - set(order))]
    by_name = {name: [r for r in records if r.name == name] for name in names}
    return {name: found for name, found in by_name.items() if found}


def rows(
    records: Sequence[Record],
    columns: Sequence[Column],
    order: Sequence[str],
    times: dict[str, list[float]],
) -> tuple[list[str], list[list[str]]]:
    """Return the table's header and rows.

    Args:
        records: of all runs.
        columns: the numbers.
        order: of the runs.
        times: seconds of a step, taken in turn; empty where that was not asked for.
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
    """Write what the runs have shown into a folder, and return the table as text.

    `results.json` has everything, `table.md` the means, `runs.csv` the columns of each seed or
    fold, `curves.png` the plot, `choices.png` what `auto` chose, if it did.
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
    """Return what times depend on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.date.today().isoformat(),
        "gpu": gpu,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def plot(
    records: Sequence[Record], curves: Sequence[Curve], order: Sequence[str], title: str
) -> bytes:
    """Return a PNG: a panel for each curve, a colour for each run, its mean over repeats bold.

    The repeats are thin lines, or a band of their standard deviation where they are many.

    Raises:
        ImportError: without matplotlib.
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
                [(row[curve.x], row[curve.y]) for row in record.history if curve.y in row]
                for record in found
            ]
            lines = [line for line in lines if line]  # without those that have only begun
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
