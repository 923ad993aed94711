"""The command line that all experiments have."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.extras import require

from . import processes, results
from .plan import SIZES, Plan, load_plan, parse_change
from .race import Race
from .race import run as take_turns
from .training import Record, Stop, Task, refuse_other_settings, restore, step_times, train

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
        columns: of the table, or what makes them from the records; those of the race without.
        curves: of the plot, the same.
        race: where the runs of a seed or fold take their steps in turn, for what.
        joint: whether torchrun's processes share every batch. If not, they share out the runs.
    """

    file: Path
    settings: type
    task: Callable[[Any, int, Path | None, torch.device], Task]
    title: str
    columns: Sequence[results.Column] | Callable[[list[Record]], Sequence[results.Column]] = ()
    curves: Sequence[results.Curve] = ()
    joint: bool = True
    race: Race | None = None


def main(experiment: Experiment, argv: Sequence[str] | None = None) -> str:
    """Train all runs that the command line asks for and return the table."""
    args, plan = parse(experiment, argv)
    device = processes.start(args.device)
    # A solve that stops at its most iterations is a result like another.
    warnings.simplefilter("ignore", dpp.ConvergenceWarning)
    runs = Runs(experiment, plan, args.data, device, (args.out or ROOT / plan.name) / plan.size)
    leading = processes.rank() == 0
    alone = contextlib.nullcontext if experiment.joint else processes.alone
    jobs = runs.of_this_process()
    if leading or experiment.joint:
        with alone():
            runs.check()
            runs.refuse_others(dropped=runs.all() if args.fresh else [])
    processes.wait()
    if args.fresh and leading:
        for name, repeat in runs.all():
            shutil.rmtree(runs.folder(name, repeat), ignore_errors=True)
    processes.wait()
    deadline = time.monotonic() + 60 * args.minutes
    try:
        with alone():
            for job in jobs:
                job(lambda: time.monotonic() > deadline)
    except Stop:
        if leading:
            print(f"stopped after {args.minutes:g} minutes; the same command goes on from here")
    except KeyboardInterrupt:
        raise SystemExit(
            "stopped; the same command goes on from the last evaluation of each run"
        ) from None
    processes.wait()
    before = runs.known_times(but=plan.runs if args.fresh else ()) if leading else {}
    table = runs.write(before) if leading else ""
    if args.time and (leading or experiment.joint):
        with alone():
            times = runs.step_times(args.time)
        if leading and not times:
            print("no run is finished, and no steps were timed", file=sys.stderr)
        elif leading:
            table = runs.write(times)
    if table:
        print(table)
        for line in runs.failures():
            print(line, file=sys.stderr)
        print(f"written: {runs.out}", file=sys.stderr)
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
        if args.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda, but PyTorch sees no GPU; expected cpu")
        for name, settings in plan.runs.items():
            base = getattr(settings, "same_time_as", "")
            if base and base not in plan.runs:
                raise ValueError(f"{name} takes the time of {base}; expected that among --runs")
    except ValueError as error:
        parser.error(str(error))
    return args, plan


@dataclass(frozen=True)
class Runs:
    """The runs of one command, each with each of its seeds or folds.

    Attributes:
        experiment: which they belong to.
        plan: their settings.
        data: where the data lie, None for those that need none.
        device: where they compute.
        out: for a folder a run, and what `write` writes.
    """

    experiment: Experiment
    plan: Plan[Any]
    data: Path | None
    device: torch.device
    out: Path

    def all(self) -> list[tuple[str, int]]:
        """Return names and repeats."""
        return [(name, repeat) for repeat in self.plan.repeats for name in self.plan.runs]

    def of_this_process(self) -> list[Callable[[Callable[[], bool]], None]]:
        """Return what this process is to train, of torchrun's; each asks whether time is over.

        Raises:
            SystemExit: if several are to race.
        """
        race = self.experiment.race
        if race is not None and processes.count() > 1:
            raise SystemExit(
                "runs that take turns are timed, in one process: give each command its own "
                "--repeats, in place of torchrun"
            )
        if race is not None:
            return [functools.partial(self.race, race, repeat) for repeat in self.plan.repeats]
        jobs = [functools.partial(self.train, name, repeat) for name, repeat in self.all()]
        return jobs if self.experiment.joint else jobs[processes.rank() :: processes.count()]

    def folder(self, name: str, repeat: int) -> Path:
        """Return where a run's checkpoint, record and events are."""
        return self.out / name / str(repeat)

    def check(self) -> None:
        """Build each run once, so that what cannot be ends the command before anything is done.

        It also leaves the data unpacked, which processes that work alone would all do at once.

        Raises:
            SystemExit: as `build` does.
        """
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SystemExit(f"--out: {error}") from None
        names, repeats = list(self.plan.runs), self.plan.repeats
        for name in names:
            self.build(name, repeats[0])
        for repeat in repeats[1:]:
            self.build(names[0], repeat)

    def refuse_others(self, dropped: Sequence[tuple[str, int]]) -> None:
        """Refuse seeds or folds that were trained with other settings than these runs.

        The table has their means.

        Args:
            dropped: those that are about to be.

        Raises:
            SystemExit: if there are any; names the folder and the settings.
        """
        for name, settings in self.plan.runs.items():
            for path in sorted((self.out / name).glob("*/record.json")):
                with contextlib.suppress(ValueError, LookupError):  # the checkpoint tells, then
                    record = json.loads(path.read_text())
                    if (name, record["repeat"]) not in dropped:
                        refuse_other_settings(path.parent, record["settings"], _plain(settings))

    def failures(self) -> list[str]:
        """Return a line for each run of this command that failed."""
        return [
            f"{r.name} {r.repeat} failed after {r.steps} of {r.total} steps: {r.error}; "
            "tried again with --fresh"
            for r in results.load_records(self.out)
            if r.error is not None and (r.name, r.repeat) in self.all()
        ]

    def build(self, name: str, repeat: int) -> Task:
        """Return a run as it begins.

        Raises:
            SystemExit: if its settings cannot be; names the run.
        """
        where = f"{self.plan.name}, {name}"
        try:
            task = self.experiment.task(self.plan.runs[name], repeat, self.data, self.device)
        except ValueError as error:
            raise SystemExit(f"{where}: {error}") from None
        if task.steps < 1 or task.eval_every < 1:
            raise SystemExit(
                f"{where}: {task.steps} steps, evaluated every {task.eval_every}; "
                "expected at least 1"
            )
        return task

    def resume(self, name: str, repeat: int) -> tuple[Task, Record, bool]:
        """Return a run as it was left, or as it begins, and whether it was left."""
        task = self.build(name, repeat)
        record = Record(name, repeat, _plain(self.plan.runs[name]), task.steps)
        return task, record, restore(task, record, self.folder(name, repeat))

    def train(self, name: str, repeat: int, is_over: Callable[[], bool]) -> None:
        """Train one run, or go on with it, until it is done or `is_over` says so (`Stop`)."""
        task, record, was_left = self.resume(name, repeat)
        base = getattr(self.plan.runs[name], "same_time_as", "")
        if base and not was_left:
            record.total = self.steps_in_same_time(name, base, repeat)
            task = self.build(name, repeat)  # of the random state that a run begins with
            task.steps = record.total
        if record.is_done:
            return
        with self.opened(task, record, is_over) as steps, _bar(f"{name} {repeat}", record) as bar:
            for _ in steps:
                bar.update(record.steps - bar.n)

    def race(self, race: Race, repeat: int, is_over: Callable[[], bool]) -> None:
        """Train all runs of a seed or fold in turn, or go on with them (`Stop`)."""
        with contextlib.ExitStack() as stack:
            runs = []
            for name in self.plan.runs:
                self.build(name, repeat).step(0)  # what is slow the first time counts for nobody
                task, record, _ = self.resume(name, repeat)
                runs.append((record, stack.enter_context(self.opened(task, record))))
            records = [record for record, _ in runs]
            bar = stack.enter_context(_bar(f"all {repeat}", max(records, key=lambda r: r.total)))
            for _ in take_turns(race, runs, task.eval_every, is_over):
                bar.total = max(record.total for record in records)
                bar.update(max(record.steps for record in records) - bar.n)
        if not all(record.is_done for record in records):
            raise Stop

    @contextlib.contextmanager
    def opened(
        self, task: Task, record: Record, is_over: Callable[[], bool] = lambda: False
    ) -> Iterator[Iterator[None]]:
        """Give what takes the steps that a run has left; its curves are written for TensorBoard."""
        folder, writer = self.folder(record.name, record.repeat), None
        if processes.rank() == 0:
            require("tensorboard", "experiments")
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(folder), purge_step=record.steps + 1)
        try:
            log = writer.add_scalar if writer is not None else lambda name, value, step: None
            yield train(task, record, folder, self.device, log, is_over)
        finally:
            if writer is not None:
                writer.close()

    def steps_in_same_time(self, name: str, base: str, repeat: int) -> int:
        """Return how many steps of a run take as long as all those of another, by steps of both."""
        tasks = {key: self.build(key, repeat) for key in (base, name)}
        times = step_times({key: (task, 0) for key, task in tasks.items()}, ROUNDS, self.device)
        shares = [theirs / ours for theirs, ours in zip(times[base], times[name], strict=True)]
        # Processes measure different times and have to take the same steps.
        share = processes.total(torch.tensor(statistics.median(shares), device=self.device))
        return max(1, round(tasks[base].steps * float(share) / processes.count()))

    def step_times(self, rounds: int) -> dict[str, list[float]]:
        """Return the seconds of the last steps of the first repeat's models, taken in turn."""
        tasks = {}
        for name in self.plan.runs:
            task, record, was_left = self.resume(name, self.plan.repeats[0])
            if was_left and record.is_done and record.error is None:
                tasks[name] = (task, max(0, record.total - rounds - 1))
        return step_times(tasks, rounds, self.device)

    def known_times(self, but: Collection[str]) -> dict[str, list[float]]:
        """Return the step times that were taken before, but those of some runs."""
        times = results.load_times(self.out)
        return {name: found for name, found in times.items() if name not in but}

    def write(self, times: dict[str, list[float]]) -> str:
        """Write what all runs in the folder have shown, and return the table, empty without any."""
        records = results.load_records(self.out)
        if not records:
            return ""
        race = self.experiment.race
        columns = self.experiment.columns or (race.columns(records) if race is not None else ())
        curves = self.experiment.curves or (race.curves if race is not None else ())
        return results.write(
            self.out,
            f"{self.experiment.title} ({self.plan.size})",
            records,
            columns(records) if callable(columns) else columns,
            curves,
            list(self.plan.runs),
            times,
        )


def _bar(name: str, record: Record) -> Any:
    """Return the progress bar of a run."""
    tqdm = require("tqdm", "experiments").tqdm
    return tqdm(
        total=record.total,
        initial=record.steps,
        desc=name,
        unit=" steps",
        mininterval=1,
        disable=processes.rank() > 0,
    )


def _plain(settings: Any) -> dict[str, Any]:
    """Return settings as JSON has them, so that those of a checkpoint compare equal."""
    found = dataclasses.asdict(settings)
    return {key: list(v) if isinstance(v, tuple) else v for key, v in found.items()}
