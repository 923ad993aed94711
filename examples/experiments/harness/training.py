"""One run, from wherever it was left to its last step.

All randomness of a step comes from its number and the run's seed, so that a run that was stopped
and resumed ends with the numbers of one that was not.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.output import write_whole

from . import processes


class Task(ABC):
    """A model, its data and its optimiser.

    Attributes:
        model: has all the parameters.
        optimizer: of them.
        steps: optimiser steps to take.
        eval_every: steps between evaluations.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    steps: int
    eval_every: int

    @abstractmethod
    def step(self, number: int) -> Tensor:
        """Take a step, from 0, and return its loss, a scalar without a graph."""

    @abstractmethod
    def evaluate(self, step: int) -> dict[str, float]:
        """Return what is measured on held-out data after so many steps, from 0.

        In several processes, the same in all.
        """


@dataclass
class Record:
    """What a run has shown so far.

    Attributes:
        name: of the run.
        repeat: its seed or fold.
        settings: what it depends on.
        total: the steps it is to take.
        steps: those it has taken.
        seconds: they took, evaluations left out.
        history: what each evaluation measured, with `step`, `seconds`, `ms_per_step` (the median
            since the one before) and `train_loss` (the mean since then).
        choices: of `auto`, as `dpp.report_choice` tells them; empty for other methods.
        error: what ended it early.
    """

    name: str
    repeat: int
    settings: dict[str, Any]
    total: int
    steps: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    choices: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        return self.error is not None or self.steps >= self.total


class Stop(Exception):
    """The time given to the command is over."""


class Diverged(ArithmeticError):
    """What a step has found in all processes alike: training cannot go on."""


def train(
    task: Task,
    record: Record,
    folder: Path,
    device: torch.device,
    log: Callable[[str, float, int], None] = lambda name, value, step: None,
    is_over: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """Train from where the record stands to the end, and yield after each step.

    Checkpoints and records are kept in a folder, after each evaluation. Whoever iterates may move
    the end, `record.total`, until the last step is taken.

    Args:
        task: as built, or as `restore` left it.
        record: filled in as the run goes on. What the model cannot bear (a loss or weights that are
            not finite, an error of a solver) ends the run and is put into `record.error`.
        folder: for checkpoint.pt and record.json.
        device: where the task computes.
        log: called with a name, a value and the step, after each evaluation.
        is_over: whether to stop here and be resumed later.

    Raises:
        Stop: if `is_over` said so; a checkpoint is there.
        torch.cuda.OutOfMemoryError: the run can be resumed with more memory.
    """
    with _failures_kept(record):
        if not record.history:
            record.history.append({"step": 0, "seconds": 0.0, **task.evaluate(0)})
        losses: list[Tensor] = []
        times: list[float] = []
        while record.steps < record.total:
            begin = _now(device)
            losses.append(task.step(record.steps))
            times.append(_now(device) - begin)
            record.seconds += times[-1]
            record.steps += 1
            at_end = record.steps == record.total
            if at_end or record.steps % task.eval_every == 0:
                found = _measured(task, record, losses, times)
                for name, value in found.items():
                    log(name, value, record.steps)
                record.history.append(found)
                record.choices = [asdict(choice) for choice in dpp.report_choice(task.model)]
                losses, times = [], []
                save(task, record, folder)
                # All processes stop at the same step or none does.
                if not at_end and processes.any_of(is_over(), device):
                    raise Stop
            yield
    if record.error is not None:
        save(task, record, folder)


def _measured(
    task: Task, record: Record, losses: list[Tensor], times: list[float]
) -> dict[str, float]:
    """Return an entry of the history, of the steps since the one before."""
    mean = float(processes.total(torch.stack(losses).mean()) / processes.count())
    if not math.isfinite(mean):
        raise Diverged(f"the mean loss of the last {len(losses)} steps is {mean}")
    if not all(bool(weights.isfinite().all()) for weights in task.model.parameters()):
        raise Diverged(f"weights are not finite after {record.steps} steps")
    processes.agree(task.model)
    return {
        "step": record.steps,
        "seconds": round(record.seconds, 3),
        "ms_per_step": round(1e3 * statistics.median(times), 3),
        "train_loss": mean,
        **task.evaluate(record.steps),
    }


@contextmanager
def _failures_kept(record: Record) -> Iterator[None]:
    """Put what the model cannot bear into a record, and let all else through."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except Diverged as error:
        record.error = str(error)
    except (ArithmeticError, RuntimeError, ValueError) as error:
        if processes.count() > 1:
            raise  # the others wait for this one
        record.error = f"{type(error).__name__}: {error}"


def save(task: Task, record: Record, folder: Path) -> None:
    """Write all that the run goes on from; the first process does."""
    if processes.rank() > 0:
        return
    buffer = io.BytesIO()
    state = {"model": task.model.state_dict(), "optimizer": task.optimizer.state_dict()}
    state["memory"] = dpp.memory_state_dict(task.model)
    torch.save({**state, "record": asdict(record)}, buffer)
    write_whole(folder / "checkpoint.pt", buffer.getvalue())
    write_whole(folder / "record.json", json.dumps(asdict(record), indent=1).encode())


def restore(task: Task, record: Record, folder: Path) -> bool:
    """Take up a run that was left, and return whether there was one.

    Raises:
        SystemExit: if it cannot be read, or had other settings; names them.
    """
    path = folder / "checkpoint.pt"
    if not path.is_file():
        return False
    # Onto the CPU: Adam's step numbers stay where they are read to, and are read in every step.
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise SystemExit(f"{path} cannot be read: {reason}; drop it with --fresh") from None
    refuse_other_settings(path, found["record"]["settings"], record.settings)
    task.model.load_state_dict(found["model"])
    if processes.rank() == 0:  # whose it is
        dpp.load_memory_state_dict(task.model, found.get("memory", {}))
    task.optimizer.load_state_dict(found["optimizer"])
    vars(record).update(found["record"])
    task.steps = record.total
    if record.is_done and processes.rank() == 0:  # in case it was killed just before the record
        write_whole(folder / "record.json", json.dumps(asdict(record), indent=1).encode())
    return True


def refuse_other_settings(path: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on with, or to average over, what was trained with other settings.

    Raises:
        SystemExit: if they differ; names them.
    """
    changed = [
        f"{key} was {then.get(key)!r} and is {now.get(key)!r}"
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key)
    ]
    if changed:
        raise SystemExit(
            f"{path} is of other settings: {', '.join(changed)}; drop it with --fresh, or choose "
            "another folder with --out"
        )


def step_times(
    tasks: dict[str, tuple[Task, int]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Return the seconds of a step of each task, taken in turn so that all see the same machine.

    Args:
        tasks: each with the number of the first step to take; their models do change.
        rounds: times that are kept, after one that warms up.
        device: where they compute.
    """
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds + 1):
        for name, (task, step) in tasks.items():
            begin = _now(device)
            task.step(step + number)
            if number > 0:
                times[name].append(_now(device) - begin)
    return times


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
