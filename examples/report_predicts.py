r"""Does a gradient report predict what a method reaches? Joins results of experiments in a picture.

    python examples/experiments/auto_digits.py --size cpu --out runs/predicts \
        --runs ift upg npg jfb --set "report_grads=[ift, upg, npg, jfb]" report_every=10
    python examples/report_predicts.py digits=runs/predicts/cpu/results.json ...

Each argument is a name and a `results.json` of runs with `report_grads`, one of which is `ift`, or
the JSON of `train_looped_lm.py --report`, whose perplexity is that with `--loops` loops. A report
is made along each run, of its own gradient. The picture has a panel per task: what a run has
reached at its end, against the cosine of its gradient at the start, after a tenth of the steps, and
at the end. The end is the last step that all runs of the task have taken, since some runs of a race
go on. The table adds the spectral radius, and the rank correlation over the methods.

A recursive model has a second panel. There the cosine is that with backpropagation through its
whole loop, which its run measures beside the report (not before its first step).
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deq_phantom_plugin._plumbing.extras import require
from deq_phantom_plugin._plumbing.output import text_table, write_whole

REACHED = {
    "accuracy": "accuracy",
    "perplexity": "perplexity, downwards is better",
    "solved": "puzzles solved",
}
WHEN = {"start": 0.0, "tenth": 0.1, "end": 1.0}


@dataclass(frozen=True)
class Point:
    """A method in a task: means over seeds or folds.

    Attributes:
        task: its name.
        method: the run's name.
        level: what was reached at the end, the last step that all runs have taken.
        key: what that is, one of `REACHED`.
        cosines: of the run's own gradient, at each of `WHEN`; NaN where the exact one is unknown.
        radii: spectral radii of df/dh, likewise.
        runs: seeds or folds.
    """

    task: str
    method: str
    level: float
    key: str
    cosines: tuple[float, ...]
    radii: tuple[float, ...]
    runs: int

    @property
    def higher(self) -> bool:
        """Whether more of what was reached is better."""
        return self.key != "perplexity"


def points(task: str, content: dict[str, Any]) -> list[Point]:
    """Return the methods of one file; twice for a recursive model, by what its cosines are with.

    Raises:
        ValueError: if the file is none of these, no run has reports, or none measures one of
            `REACHED`.
    """
    if not isinstance(content, dict) or not isinstance(content.get("runs"), list):
        raise ValueError("expected a results.json, or the JSON of train_looped_lm.py")
    if "costs" in content:
        content = {"runs": [_looped(run, content["settings"]) for run in content["runs"]]}
    # Their reports may lack `report_cosine`: it needs an exact gradient.
    is_recursive = any("solved" in row for run in content["runs"] for row in run["history"])
    if not is_recursive:
        return _points(task, content, "cosine")
    with_loop = _points(f"{task}, with backpropagation", content, "cosine")
    return [*_points(task, content, "report_cosine"), *with_loop]


def _looped(run: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return a run of `train_looped_lm.py` as one of the experiments.

    Raises:
        ValueError: if its perplexity was not measured with as many loops as in training.
    """
    loops = str(settings["loops"])
    history = [dict(row) for row in run["history"]]
    for row in history:
        if (by_loops := row.get("perplexity")) is not None:
            if loops not in by_loops:
                raise ValueError(f"--loops {loops} is none of --test-loops {', '.join(by_loops)}")
            # JSON has no infinity, so that of a run that has diverged is null there.
            row["perplexity"] = math.inf if by_loops[loops] is None else by_loops[loops]
    return {**run, "name": run["method"], "history": history, "total": settings["steps"]}


def _points(task: str, content: dict[str, Any], cosine: str) -> list[Point]:
    """Return the methods of one file, with one of its cosines."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for run in content["runs"]:
        reports = [row for row in run["history"] if "report_rho" in row]
        if reports and run["error"] is None and run["steps"] >= run["total"]:
            by_name.setdefault(run["name"], []).append(run)
    if not by_name:
        raise ValueError(f"{task}: no finished run has reports; expected runs with report_grads")
    end = min(run["steps"] for runs in by_name.values() for run in runs)
    found = []
    for name, runs in by_name.items():
        rows = [row for run in runs for row in run["history"]]
        known = [key for key in REACHED if any(key in row for row in rows)]
        if not known:
            raise ValueError(f"{task}, {name}: none of {', '.join(REACHED)} was measured")
        key = known[0]
        worst = math.inf if key == "perplexity" else -math.inf
        level = []
        for run in runs:
            known_until = [row[key] for row in run["history"] if key in row and row["step"] <= end]
            if not known_until:
                raise ValueError(
                    f"{task}, {name}: no {key} at or before step {end}, the end of all"
                )
            level.append(worst if known_until[-1] is None else known_until[-1])  # it has diverged
        cosines, radii = (
            tuple(_mean([_at(run, what, part, end) for run in runs]) for part in WHEN.values())
            for what in (cosine, "report_rho")
        )
        mean = statistics.fmean(level)
        found.append(Point(task, name, mean, key, cosines, radii, len(runs)))
    return found


def _at(run: dict[str, Any], key: str, part: float, end: int) -> float:
    """Return a number of the report that is nearest to a part of the training.

    NaN if none is near: within a tenth of the training, and not that of the start for a later part.
    """
    rows = [row for row in run["history"] if "report_rho" in row and (row["step"] > 0 or part == 0)]
    away = {abs(row["step"] - part * end): row for row in rows}
    nearest = min(away, default=math.inf)
    return away[nearest].get(key, math.nan) if nearest <= 0.1 * end else math.nan


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if value is not None and not math.isnan(value)]
    return statistics.fmean(known) if known else math.nan


def correlation(found: Sequence[Point], when: int) -> float:
    """Return Spearman's rank correlation of cosine and level over methods, NaN of fewer than 3."""
    pairs = [(p.cosines[when], p.level if p.higher else -p.level) for p in found]
    pairs = [pair for pair in pairs if not math.isnan(pair[0])]
    if len(pairs) < 3:
        return math.nan
    try:
        return statistics.correlation(*map(_ranks, zip(*pairs, strict=True)))
    except statistics.StatisticsError:  # all are equal
        return math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    """Return ranks from 1; equal values share the mean of theirs."""
    order = sorted(values)
    return [order.index(v) + (order.count(v) + 1) / 2 for v in values]


def table(found: Sequence[Point]) -> tuple[list[str], list[list[str]]]:
    """Return the header and a row per method, and one per task for the correlations."""
    header = ["task", "method", *(f"cosine, {w}" for w in WHEN), *(f"rho, {w}" for w in WHEN)]
    rows = []
    for task in dict.fromkeys(p.task for p in found):
        here = [p for p in found if p.task == task]
        for p in sorted(here, key=lambda p: p.level, reverse=here[0].higher):
            numbers = [f"{x:.3f}" for x in (*p.cosines, *p.radii)]
            rows.append([task, p.method, *numbers, f"{p.level:.4g}", str(p.runs)])
        ranks = [f"{correlation(here, i):.2f}" for i in range(len(WHEN))]
        rows.append([task, "rank correlation", *ranks, "", "", "", "", ""])
    return [*header, "reached", "runs"], rows


def picture(found: Sequence[Point]) -> bytes:
    """Return a PNG: a panel per task, a line per method from its start to its end.

    Raises:
        ImportError: without matplotlib.
    """
    require("matplotlib", "viz")
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(p.task for p in found))
    columns = min(3, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    figure = Figure(figsize=(4.0 * columns + 3.0, 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    methods = list(dict.fromkeys(p.method for p in found))
    colors = {method: colormaps["tab20"](i % 20) for i, method in enumerate(methods)}
    for axes in panels[len(tasks) :]:
        axes.set_axis_off()
    for axes, task in zip(panels, tasks, strict=False):
        here = [p for p in found if p.task == task]
        for p in here:
            color = colors[p.method]
            axes.plot(p.cosines, [p.level] * len(WHEN), "-", c=color, linewidth=0.8, alpha=0.6)
            for cosine, marker in zip(p.cosines, "osX", strict=True):
                face = "none" if marker == "o" else color
                axes.plot(cosine, p.level, marker, c=color, markerfacecolor=face)
        axes.set(xlabel="cosine of the run's own gradient", title=task)
        axes.set(ylabel=REACHED[here[0].key])
        axes.grid(alpha=0.3)
        if not here[0].higher:
            axes.invert_yaxis()
    first = panels[0]
    handles = [
        *(first.plot([], [], "-", c=colors[method], label=method)[0] for method in methods),
        *(
            first.plot([], [], mark, c="0.3", markerfacecolor=face, label=when)[0]
            for mark, face, when in zip("osX", ("none", "0.3", "0.3"), WHEN, strict=True)
        ),
    ]
    figure.legend(handles=handles, fontsize=7, loc="outside right center")
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def main(argv: Sequence[str] | None = None) -> None:
    """Write the picture and the table, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("files", nargs="+", metavar="NAME=FILE", help="tasks, and their results.json")
    add("--out", type=Path, default=Path("runs/experiments/report_predicts"), help="folder")
    args = parser.parse_args(argv)
    found: list[Point] = []
    for text in args.files:
        name, equals, file = text.partition("=")
        try:
            if not equals or not name or any(p.task == name for p in found):
                raise ValueError(f"{text!r}; expected NAME=FILE, with another NAME for each FILE")
            found += points(name, json.loads(Path(file).read_text()))
        except KeyError as error:
            sys.exit(
                f"report_predicts: {file}: a run has no {error}; expected a whole results.json"
            )
        except (OSError, TypeError, ValueError) as error:
            sys.exit(f"report_predicts: {file or text}: {error}")
    header, rows = table(found)
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows([header, *rows])
    write_whole(args.out / "report_predicts.csv", lines.getvalue().encode())
    write_whole(args.out / "report_predicts.png", picture(found))
    print(text_table(header, rows))


if __name__ == "__main__":
    main()
