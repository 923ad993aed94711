"""Lets several runs take their steps in turn on one machine, and measures when each is good enough.

One of the runs is the base. All runs first take as many steps as the base. A run that is then not
yet as good as the base at its end goes on, until it is or has taken as long as the base. So a run
with a cheap gradient may take more steps.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .results import Column, Curve, last, median_of, milliseconds
from .training import Record

SMOOTH = 3  # the level of a run is the median of so many evaluations; a single one may be lucky


@dataclass(frozen=True)
class Race:
    """The goal of a race.

    Attributes:
        key: the key in the history of the value that is compared.
        label: the name of the value in the table and the plot.
        higher: whether a higher value is better.
        scale: the factor by which the value is multiplied in the table.
        text: the format of the value in the table.
        base: the name of the run whose level at its end is the target.
    """

    key: str
    label: str
    higher: bool = True
    scale: float = 1.0
    text: str = "{:.1f}"
    base: str = "ift"

    def reached(self, record: Record, key: str = "") -> list[tuple[int, float, float]]:
        """Return the step, the seconds and the level at each evaluation.

        The level is the median of the last `SMOOTH` values of `key`, by default that of the race.
        """
        key = key or self.key
        rows = [row for row in record.history if key in row and row["step"] > 0]
        values = [row[key] for row in rows]
        return [
            (int(row["step"]), row["seconds"], statistics.median(values[max(0, n - SMOOTH) : n]))
            for n, row in enumerate(rows, start=1)
        ]

    def level(self, record: Record, steps: int) -> float:
        """Return the level of a run after so many steps, or NaN if it did not take them."""
        return next((v for step, _, v in reversed(self.reached(record)) if step == steps), math.nan)

    def time_to(self, record: Record, target: float) -> float:
        """Return the seconds until a run has reached a target, or infinity if it never has."""
        sign = 1 if self.higher else -1
        times = (t for _, t, v in self.reached(record) if sign * v >= sign * target)
        return next(times, math.inf)

    def time_to_loss(self, record: Record, base: Record) -> float:
        """Return the seconds until a run has the training loss that the base ends with."""
        found = (v for step, _, v in self.reached(base, "train_loss") if step == base.steps)
        target = next(found, math.nan)
        times = (t for _, t, v in self.reached(record, "train_loss") if v <= target)
        return next(times, math.inf)

    def goes_on(self, record: Record, base: Record) -> bool:
        """Return whether a run that has taken all its steps is to take more."""
        if record.error is not None or base.error is not None or not base.is_done:
            return False
        target = self.level(base, base.steps)
        return self.time_to(record, target) == math.inf and record.seconds < base.seconds

    def columns(self, records: Sequence[Record]) -> list[Column]:
        """Return the columns of the table.

        They show the level at the last step of the base, the time to the level of the base there,
        the time to its training loss there, which is less noisy, and the time of a step. All times
        are relative to the base. Without a base the level is that at a run's own last step.
        """
        bases = {r.repeat: r for r in records if r.name == self.base and r.is_done and not r.error}
        with_base = {r.repeat for r in records if r.name == self.base}

        def of_base(number: Callable[[Record, Record], float]) -> Callable[[Record], float]:
            return lambda r: number(r, bases[r.repeat]) if r.repeat in bases else math.nan

        def reached(record: Record) -> float:
            base = bases.get(record.repeat, None if record.repeat in with_base else record)
            return self.scale * self.level(record, base.steps) if base is not None else math.nan

        def time(record: Record, base: Record) -> float:
            target = self.level(base, base.steps)
            return self.time_to(record, target) / self.time_to(base, target)

        return [
            Column(
                self.label,
                reached,
                self.text,
            ),
            Column(f"time to {self.base}'s, over {self.base}", of_base(time), "{:.2f}", median_of),
            Column(
                f"time to {self.base}'s training loss",
                of_base(lambda r, base: self.time_to_loss(r, base) / self.time_to_loss(base, base)),
                "{:.2f}",
                median_of,
            ),
            Column(
                f"step over {self.base}'s",
                of_base(lambda r, base: milliseconds(r) / milliseconds(base)),
                "{:.2f}",
                median_of,
            ),
            Column("train loss", last("train_loss"), "{:.3f}"),
        ]

    @property
    def curves(self) -> list[Curve]:
        """The panels of the plot."""
        return [
            Curve(self.key, self.label, scale=self.scale),
            Curve(self.key, self.label, x="seconds", scale=self.scale),
            Curve("train_loss", "training loss", x="seconds"),
        ]


def run(
    race: Race,
    runs: Sequence[tuple[Record, Iterator[None]]],
    every: int,
    is_over: Callable[[], bool],
) -> Iterator[None]:
    """Let runs take their steps in turn until each is done.

    Without the base among them, each takes its own steps, and there is no goal.

    Args:
        race: the goal.
        runs: the record of each run, and an iterator that takes its steps, see `train`.
        every: the number of steps between evaluations. A run that goes on does so until the next.
        is_over: returns whether to stop. It is called when all runs have been evaluated.

    Yields:
        None, after each turn in which every run has taken a step.
    """
    base = next((record for record, _ in runs if record.name == race.base), None)
    while True:
        for record, _ in runs:
            if base is not None and record.is_done and race.goes_on(record, base):
                # To the next evaluation: two that are near one another would count twice.
                record.total = (record.steps // every + 1) * every
        left = [(record, steps) for record, steps in runs if not record.is_done]
        if not left:
            return
        # Runs that were behind when the command was stopped catch up first.
        behind = min(record.steps for record, _ in left)
        first = behind % len(left)  # the order rotates, so no run always follows the same one
        for record, steps in left[first:] + left[:first]:
            if record.steps == behind:
                next(steps, None)
        yield
        if all(record.steps % every == 0 for record, _ in left) and is_over():
            return
