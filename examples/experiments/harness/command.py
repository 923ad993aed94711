"""The command line that all experiments share.

An experiment describes itself by an `Experiment` and calls `main`. `arguments` reads the command
line and the YAML file, `Runs` trains each run with each seed or fold and can resume it, and
`results` writes the table. All runs of a command lie in one folder.
"""

from __future__ import annotations

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
from .arguments import ROOT, parse
from .plan import Plan
from .race import Race
from .race import run as take_turns
from .training import Record, Stop, Task, refuse_other_settings, restore, step_times, train

ROUNDS = 5  # timed steps by which the length of a run is measured (`same_time_as`)


@dataclass(frozen=True)
class Experiment:
    """The description of one experiment.

    Attributes:
        file: the script of the experiment; the YAML file lies beside it.
        settings: the dataclass of a run's settings. If it has a field `same_time_as`, this names
            another run; the run then takes as many steps as fit into the time of that one.
        task: builds a run from its settings, its seed or fold, the data path or None, and a device.
        title: the title of the plot.
        columns: the columns of the table, or a function that makes them from the records. If they
            are left out, they are those of the race.
        curves: the curves of the plot. If they are left out, they are those of the race.
        race: the goal of the runs, if the runs of a seed or fold take their steps in turn.
        joint: whether the processes of torchrun share every batch. If not, each process trains some
            of the runs.
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
    """Train all runs that the command line asks for, and return the table.

    Args:
        experiment: the experiment.
        argv: the arguments; those of the process if None.
    """
    args, plan = parse(experiment.file, experiment.settings, experiment.title, argv)
    device = processes.start(args.device)
    # A solve that stops at its largest number of iterations is a normal result here.
    warnings.simplefilter("ignore", dpp.ConvergenceWarning)
    out = (args.out or ROOT / plan.name) / plan.size
    runs = Runs(experiment, plan, args.data, device, out, args.also)
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
            print("no run is finished, so no steps were timed", file=sys.stderr)
        elif leading:
            table = runs.write(times)
    if table:
        print(table)
        for line in runs.failures():
            print(line, file=sys.stderr)
        print(f"written: {runs.out}", file=sys.stderr)
    processes.stop()
    return table


@dataclass(frozen=True)
class Runs:
    """The runs of one command, each with all its seeds or folds.

    Attributes:
        experiment: the experiment.
        plan: the settings of the runs.
        data: the path of the data; None if they are generated.
        device: the device on which the runs compute.
        out: the folder for results, with one folder per run.
        also: `results.json` files of earlier commands.
    """

    experiment: Experiment
    plan: Plan[Any]
    data: Path | None
    device: torch.device
    out: Path
    also: Sequence[Path] = ()

    def all(self) -> list[tuple[str, int]]:
        """Return the name and the repeat (seed or fold) of every run."""
        return [(name, repeat) for repeat in self.plan.repeats for name in self.plan.runs]

    def of_this_process(self) -> list[Callable[[Callable[[], bool]], None]]:
        """Return the jobs of this process. A job is called with a function: whether time is over.

        Raises:
            SystemExit: if runs that take turns are started in several processes.
        """
        race = self.experiment.race
        if race is not None and processes.count() > 1:
            raise SystemExit(
                "runs that take turns are timed, so they must run in one process. In place of "
                "torchrun, start one command per process, with --repeats of its own"
            )
        if race is not None:
            return [functools.partial(self.race, race, repeat) for repeat in self.plan.repeats]
        jobs = [functools.partial(self.train, name, repeat) for name, repeat in self.all()]
        return jobs if self.experiment.joint else jobs[processes.rank() :: processes.count()]

    def folder(self, name: str, repeat: int) -> Path:
        """Return the folder of a run's checkpoint, record and TensorBoard events."""
        return self.out / name / str(repeat)

    def check(self) -> None:
        """Build each run once, so that invalid settings end the command before any training.

        This also unpacks the data once. Otherwise all processes that work alone would unpack them
        at the same time.

        Raises:
            SystemExit: see `build`.
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
        """Refuse records in the folder that were trained with other settings than these runs.

        The table shows means over all records of a run, so their settings must be the same.

        Args:
            dropped: the runs that are about to be deleted, which do not count.

        Raises:
            SystemExit: if there is such a record; the message names the folder and the settings.
        """
        for name, settings in self.plan.runs.items():
            for path in sorted((self.out / name).glob("*/record.json")):
                # A record that cannot be read is passed over; the checkpoint has the settings, too.
                with contextlib.suppress(ValueError, LookupError):
                    record = json.loads(path.read_text())
                    if (name, record["repeat"]) not in dropped:
                        refuse_other_settings(path.parent, record["settings"], _plain(settings))

    def failures(self) -> list[str]:
        """Return a line for each run of this command that failed."""
        return [
            f"{r.name} {r.repeat} failed after {r.steps} of {r.total} steps: {r.error}; "
            "--fresh tries it again"
            for r in results.load_records(self.out)
            if r.error is not None and (r.name, r.repeat) in self.all()
        ]

    def build(self, name: str, repeat: int) -> Task:
        """Return the task of a run before its first step.

        Raises:
            SystemExit: if its settings are invalid; the message names the run.
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
        """Return the task and the record of a run, and whether they come from a checkpoint."""
        task = self.build(name, repeat)
        settings, environment = _plain(self.plan.runs[name]), results.environment()
        record = Record(name, repeat, settings, task.steps, environment=environment)
        return task, record, restore(task, record, self.folder(name, repeat))

    def train(self, name: str, repeat: int, is_over: Callable[[], bool]) -> None:
        """Train or resume one run until it is done; if `is_over` returns True, raise `Stop`."""
        task, record, was_left = self.resume(name, repeat)
        base = getattr(self.plan.runs[name], "same_time_as", "")
        if base and not was_left:
            record.total = self.steps_in_same_time(name, base, repeat)
            task = self.build(name, repeat)  # again, with the random state of a fresh run
            task.steps = record.total
        if record.is_done:
            return
        with self.opened(task, record, is_over) as steps, _bar(f"{name} {repeat}", record) as bar:
            for _ in steps:
                bar.update(record.steps - bar.n)

    def race(self, race: Race, repeat: int, is_over: Callable[[], bool]) -> None:
        """Train or resume all runs of a seed or fold in turn; may raise `Stop` as `train` does."""
        with contextlib.ExitStack() as stack:
            runs = []
            for name in self.plan.runs:
                self.build(name, repeat).step(0)  # warms up, so that no run pays for it
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
        """Yield an iterator that takes the remaining steps of a run, and log to TensorBoard."""
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
        """Return how many steps of run `name` take as long as all steps of run `base`.

        Some steps of both are timed in turn.
        """
        tasks = {key: self.build(key, repeat) for key in (base, name)}
        times = step_times({key: (task, 0) for key, task in tasks.items()}, ROUNDS, self.device)
        shares = [theirs / ours for theirs, ours in zip(times[base], times[name], strict=True)]
        # Processes measure different times, but must take the same number of steps.
        share = processes.total(torch.tensor(statistics.median(shares), device=self.device))
        return max(1, round(tasks[base].steps * float(share) / processes.count()))

    def step_times(self, rounds: int) -> dict[str, list[float]]:
        """Return the seconds per step of the trained models of the first repeat, timed in turn."""
        tasks = {}
        for name in self.plan.runs:
            task, record, was_left = self.resume(name, self.plan.repeats[0])
            if was_left and record.is_done and record.error is None:
                tasks[name] = (task, max(0, record.total - rounds - 1))
        return step_times(tasks, rounds, self.device)

    def beside(self, records: Sequence[Record]) -> list[Record]:
        """Return records, and those of earlier commands that are not among them.

        Raises:
            SystemExit: if one of these was trained with other settings; the message names them.
        """
        found = {(record.name, record.repeat): record for record in records}
        for path in self.also:
            for record in results.finished_records(path):
                if record.name in self.plan.runs:
                    now = _plain(self.plan.runs[record.name])
                    # A setting that is newer than the file had its default.
                    then = {**_plain_defaults(self.experiment.settings), **record.settings}
                    refuse_other_settings(path, then, now)
                found.setdefault((record.name, record.repeat), record)
        return sorted(found.values(), key=lambda record: (record.name, record.repeat))

    def known_times(self, but: Collection[str]) -> dict[str, list[float]]:
        """Return the step times of earlier commands, without those of the runs in `but`."""
        times = results.load_times(self.out)
        return {name: found for name, found in times.items() if name not in but}

    def write(self, times: dict[str, list[float]]) -> str:
        """Write the results of all runs in the folder, and return the table, or an empty text."""
        records = self.beside(results.load_records(self.out))
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
        disable=processes.rank() > 0 or None,  # None disables it if the output is not a terminal
    )


def _plain(settings: Any) -> dict[str, Any]:
    """Return settings as JSON stores them, so that they can be compared with a checkpoint's."""
    found = dataclasses.asdict(settings)
    return {key: list(v) if isinstance(v, tuple) else v for key, v in found.items()}


def _plain_defaults(kind: type) -> dict[str, Any]:
    """Return the settings that have a default, as `_plain` does."""
    fields = [f for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING]
    return {f.name: list(f.default) if isinstance(f.default, tuple) else f.default for f in fields}
