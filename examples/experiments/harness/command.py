"""The command line that all experiments have."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import deq_phantom_plugin as dpp
from deq_phantom_plugin.extras import require

from . import processes, results
from .plan import SIZES, Plan, load_plan, parse_change
from .training import Record, Stop, Task, restore, step_times, train

ROOT = Path("runs/experiments")
ROUNDS = 5  # of step times that a run's length is measured by


@dataclass(frozen=True)
class Experiment:
    """What one experiment consists of.

    Attributes:
        file: its script; the YAML file lies beside it.
        settings: the dataclass of a run's settings, all of which `task` depends on; one named
            `same_time_as`, where it has that, names a run whose time this one is to take.
        task: builds a run from its settings, seed or fold, data path (None without) and device.
        title: of the plot.
        columns: of the table, or what makes them from the records.
        curves: of the plot.
        joint: whether torchrun's processes share every batch. If not, they share out the runs.
    """

    file: Path
    settings: type
    task: Callable[[Any, int, Path | None, torch.device], Task]
    title: str
    columns: Sequence[results.Column] | Callable[[list[Record]], Sequence[results.Column]]
    curves: Sequence[results.Curve]
    joint: bool = True


def main(experiment: Experiment, argv: Sequence[str] | None = None) -> str:
    """Train all runs that the command line asks for and return the table."""
    args, plan = parse(experiment, argv)
    device = processes.start(args.device)
    # A solve that stops at its most iterations is a result like another.
    warnings.simplefilter("ignore", dpp.ConvergenceWarning)
    out = (args.out or ROOT / plan.name) / plan.size
    leading = processes.rank() == 0
    if args.fresh and leading:
        for name in plan.runs:
            for repeat in plan.repeats:
                shutil.rmtree(out / name / str(repeat), ignore_errors=True)
    processes.wait()
    deadline = time.monotonic() + 60 * args.minutes
    jobs = [(name, repeat) for repeat in plan.repeats for name in plan.runs]
    if not experiment.joint:
        jobs = jobs[processes.rank() :: processes.count()]
    try:
        with contextlib.nullcontext() if experiment.joint else processes.alone():
            for name, repeat in jobs:
                train_one(experiment, plan, name, repeat, args, device, out, deadline)
    except Stop:
        if leading:
            print(f"stopped after {args.minutes:g} minutes; the same command goes on from here")
    except KeyboardInterrupt:
        raise SystemExit(
            "stopped; the same command goes on from the last evaluation of each run"
        ) from None
    processes.wait()
    table = ""
    if leading:
        times = {}
        if args.time:
            times = trained_step_times(experiment, plan, args, device, out)
        title = f"{experiment.title} ({plan.size})"
        records = results.load_records(out)
        if records:
            columns, curves = experiment.columns, experiment.curves
            columns = columns(records) if callable(columns) else columns
            table = results.write(out, title, records, columns, curves, list(plan.runs), times)
            print(table)
            print(f"written: {out}", file=sys.stderr)
    processes.stop()
    return table


def parse(
    experiment: Experiment, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, Plan[Any]]:
    """Return the arguments, and the plan that they choose."""
    parser = argparse.ArgumentParser(
        description=sys.modules["__main__"].__doc__ if argv is None else experiment.title,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--size", choices=SIZES, default="smoke", help="how much to train (smoke)")
    add("--data", type=Path, help="where the data lie; needed where they are not generated")
    add("--runs", nargs="+", default=[], metavar="NAME", help="only these of the YAML file")
    add("--repeats", nargs="+", type=int, default=[], metavar="N", help="seeds, or folds")
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="settings of all runs",
    )
    add("--device", default="auto", help="cpu or cuda (a GPU where there is one)")
    add("--minutes", type=float, default=float("inf"), help="stop then, to be resumed later")
    add("--fresh", action="store_true", help="drop what these runs have done, do not resume")
    add("--time", type=int, default=0, metavar="N", help="N steps of each trained model, in turn")
    add("--out", type=Path, help=f"folder for results ({ROOT}/NAME)")
    args = parser.parse_args(argv)
    try:
        changes = dict(parse_change(text) for text in args.set)
        path = experiment.file.with_suffix(".yaml")
        plan = load_plan(path, args.size, experiment.settings, changes, args.runs, args.repeats)
        if not args.minutes >= 0 or args.time < 0:
            raise ValueError(f"--minutes {args.minutes} --time {args.time}; expected 0 or more")
        if args.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"--device {args.device}; expected cpu, cuda or auto")
    except ValueError as error:
        parser.error(str(error))
    return args, plan


def train_one(
    experiment: Experiment,
    plan: Plan[Any],
    name: str,
    repeat: int,
    args: argparse.Namespace,
    device: torch.device,
    out: Path,
    deadline: float,
) -> None:
    """Train one run with one seed or fold, or go on with it."""
    settings = plan.runs[name]
    folder = out / name / str(repeat)
    task = build(experiment, plan, name, repeat, args, device)
    record = Record(name, repeat, _plain(settings), task.steps)
    if not restore(task, record, folder, device):
        base = getattr(settings, "same_time_as", "")
        if base:
            task.steps = record.total = steps_in_same_time(
                experiment, plan, name, base, repeat, args, device
            )
            task = build(experiment, plan, name, repeat, args, device)  # as it was before
            task.steps = record.total
    if record.is_done:
        return
    tqdm = require("tqdm", "experiments").tqdm
    bar = tqdm(
        total=record.total,
        initial=record.steps,
        desc=f"{name} {repeat}",
        unit=" steps",
        mininterval=1,
        disable=processes.rank() > 0,
    )
    writer = None
    if processes.rank() == 0:
        require("tensorboard", "experiments")
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder), purge_step=record.steps + 1)
    try:
        train(
            task,
            record,
            folder,
            device,
            on_step=lambda record: bar.update(record.steps - bar.n),
            log=writer.add_scalar if writer is not None else lambda name, value, step: None,
            is_over=lambda: time.monotonic() > deadline,
        )
    finally:
        bar.close()
        if writer is not None:
            writer.close()


def build(
    experiment: Experiment,
    plan: Plan[Any],
    name: str,
    repeat: int,
    args: argparse.Namespace,
    device: torch.device,
) -> Task:
    """Return a run as it begins.

    Raises:
        SystemExit: if its settings cannot be; names the run.
    """
    try:
        task = experiment.task(plan.runs[name], repeat, args.data, device)
    except ValueError as error:
        raise SystemExit(f"{plan.name}, {name}: {error}") from None
    if task.steps < 1 or task.eval_every < 1:
        raise SystemExit(
            f"{plan.name}, {name}: {task.steps} steps, evaluated every {task.eval_every}; "
            "expected at least 1"
        )
    return task


def steps_in_same_time(
    experiment: Experiment,
    plan: Plan[Any],
    name: str,
    base: str,
    repeat: int,
    args: argparse.Namespace,
    device: torch.device,
) -> int:
    """Return how many steps of a run take as long as all those of another, by steps of both.

    Raises:
        ValueError: if the other is not among the runs.
    """
    if base not in plan.runs:
        raise ValueError(f"{name} is to take the time of {base}; expected that among --runs")
    tasks = {key: build(experiment, plan, key, repeat, args, device) for key in (base, name)}
    times = step_times({key: (task, 0) for key, task in tasks.items()}, ROUNDS, device)
    shares = [theirs / ours for theirs, ours in zip(times[base], times[name], strict=True)]
    # Processes measure different times and have to take the same steps.
    share = processes.total(torch.tensor(statistics.median(shares), device=device))
    return max(1, round(tasks[base].steps * float(share) / processes.count()))


def trained_step_times(
    experiment: Experiment,
    plan: Plan[Any],
    args: argparse.Namespace,
    device: torch.device,
    out: Path,
) -> dict[str, list[float]]:
    """Return the seconds of steps of each run's trained model, of its first seed, taken in turn."""
    tasks = {}
    for name, settings in plan.runs.items():
        task = build(experiment, plan, name, plan.repeats[0], args, device)
        record = Record(name, plan.repeats[0], _plain(settings), task.steps)
        was_left = restore(task, record, out / name / str(plan.repeats[0]), device)
        if was_left and record.is_done and record.error is None:
            tasks[name] = (task, record.total - 1)
    return step_times(tasks, args.time, device)


def _plain(settings: Any) -> dict[str, Any]:
    """Return settings as JSON has them, so that those of a checkpoint compare equal."""
    found = dataclasses.asdict(settings)
    return {key: list(v) if isinstance(v, tuple) else v for key, v in found.items()}
