"""Trains one run, from its last checkpoint to its last step.

A `Task` has the model, the data and the optimiser. `train` takes its steps, evaluates it, and fills
in a `Record`. The randomness of a step depends only on its number and on the seed of the run. So a
run that is stopped and resumed ends with the same numbers as one that is not.
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
        model: the module with all parameters.
        optimizer: the optimiser of these parameters.
        steps: the number of optimiser steps to take.
        eval_every: the number of steps between evaluations.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    steps: int
    eval_every: int

    @abstractmethod
    def step(self, number: int) -> Tensor:
        """Take optimiser step `number`, counted from 0, and return its loss.

        The loss is a scalar without a graph.
        """

    @abstractmethod
    def evaluate(self, step: int) -> dict[str, float]:
        """Return what is measured on held-out data after so many steps, by name.

        With several processes, the result is the same in all of them.
        """


@dataclass
class Record:
    """The results of a run so far.

    Attributes:
        name: the name of the run.
        repeat: its seed or fold.
        settings: its settings.
        total: the number of steps that it is to take.
        steps: the number of steps that it has taken.
        seconds: the seconds that these steps took, without evaluations.
        history: the results of each evaluation, with `step`, `seconds`, `ms_per_step` (the median
            since the evaluation before) and `train_loss` (the mean since then).
        choices: the choices of `auto`, as `dpp.report_choice` returns them; empty otherwise.
        error: the error that ended the run early, or None.
        environment: where and when it was trained, see `results.environment`.
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
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        """Whether the run has taken all its steps, or has failed."""
        return self.error is not None or self.steps >= self.total


class Stop(Exception):
    """The time of the command is over."""


class Diverged(ArithmeticError):
    """Training cannot go on; all processes raise this error in the same step."""


def train(
    task: Task,
    record: Record,
    folder: Path,
    device: torch.device,
    log: Callable[[str, float, int], None] = lambda name, value, step: None,
    is_over: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """Train from the last step of the record to the end, and yield after each step.

    A checkpoint and the record are saved after each evaluation. The caller may change the end,
    `record.total`, until the last step is taken.

    Args:
        task: the task, as it was built or restored.
        record: the record, which is filled in. If the model fails (a loss or weights that are not
            finite, an error of a solver), the run ends and `record.error` has the message.
        folder: the folder for checkpoint.pt and record.json.
        device: the device on which the task computes.
        log: is called after each evaluation, with a name, a value and the step.
        is_over: returns whether to stop, so that the run is resumed later.

    Yields:
        None, after each step.

    Raises:
        Stop: if `is_over` returned True; a checkpoint was saved.
        torch.cuda.OutOfMemoryError: if the memory is too small; the run can be resumed with more.
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
                # All processes must stop at the same step.
                if not at_end and processes.any_of(is_over(), device):
                    raise Stop
            yield
    if record.error is not None:
        save(task, record, folder)


def _measured(
    task: Task, record: Record, losses: list[Tensor], times: list[float]
) -> dict[str, float]:
    """Evaluate, and return an entry of the history with the steps since the last entry.

    Raises:
        Diverged: if the mean loss or the weights are not finite.
    """
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
    """Put failures of the model into a record, and let all other errors through."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except Diverged as error:
        record.error = str(error)
    except (ArithmeticError, RuntimeError, ValueError) as error:
        if processes.count() > 1:
            raise  # the other processes would wait for this one for ever
        record.error = f"{type(error).__name__}: {error}"


def save(task: Task, record: Record, folder: Path) -> None:
    """Save a checkpoint and the record; only the first process writes."""
    if processes.rank() > 0:
        return
    buffer = io.BytesIO()
    state = {"model": task.model.state_dict(), "optimizer": task.optimizer.state_dict()}
    state["memory"] = dpp.memory_state_dict(task.model)
    torch.save({**state, "record": asdict(record)}, buffer)
    write_whole(folder / "checkpoint.pt", buffer.getvalue())
    write_whole(folder / "record.json", json.dumps(asdict(record), indent=1).encode())


def restore(task: Task, record: Record, folder: Path) -> bool:
    """Load the checkpoint of a run if there is one, and return whether there is one.

    Raises:
        SystemExit: if it cannot be read, or if it has other settings; the message names them.
    """
    path = folder / "checkpoint.pt"
    if not path.is_file():
        return False
    # Loaded to the CPU: Adam's step numbers stay where they are loaded, and are read in each step.
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise SystemExit(f"{path} cannot be read: {reason}; drop it with --fresh") from None
    refuse_other_settings(path, found["record"]["settings"], record.settings)
    task.model.load_state_dict(found["model"])
    if processes.rank() == 0:  # the checkpoint has the memory of the first process
        dpp.load_memory_state_dict(task.model, found.get("memory", {}))
    task.optimizer.load_state_dict(found["optimizer"])
    vars(record).update(found["record"])
    task.steps = record.total
    # The process may have been killed between the checkpoint and the record.
    if record.is_done and processes.rank() == 0:
        write_whole(folder / "record.json", json.dumps(asdict(record), indent=1).encode())
    return True


def refuse_other_settings(path: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse a checkpoint or a record of other settings.

    Args:
        path: the file, for the message.
        then: the settings in the file.
        now: the settings of this command.

    Raises:
        SystemExit: if settings differ; the message names them.
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
    """Return the seconds per step of each task; the tasks take turns, so that conditions are equal.

    Args:
        tasks: each task by name, with the number of its first step. Their models are trained on.
        rounds: the number of timed steps per task, after one that warms up.
        device: the device on which the tasks compute.
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
    """Return the time, once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
