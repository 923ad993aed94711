"""Runs that take their steps in turn, on one machine, and how soon each is good enough.

All take the steps of one of them, the base. One that is not yet as good as the base is at its end
goes on, until it is or has taken as long as the base did. So a cheap gradient may take more steps,
which is what it is cheap for.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .results import Column, Curve, last, median_of, milliseconds
from .training import Record

SMOOTH = 3  # evaluations, whose median is what a run has reached: single ones are lucky


@dataclass(frozen=True)
class Race:
    """What is to be reached.

    Attributes:
        key: of the history.
        label: what it is called.
        higher: whether more of it is better.
        scale: what it is multiplied by in the table.
        text: how it is written there.
        base: the run whose end is the target.
    """

    key: str
    label: str
    higher: bool = True
    scale: float = 1.0
    text: str = "{:.1f}"
    base: str = "ift"

    def reached(self, record: Record) -> list[tuple[int, float, float]]:
        """Return step, seconds and level of each evaluation, the median of the last `SMOOTH`."""
        rows = [row for row in record.history if self.key in row and row["step"] > 0]
        values = [row[self.key] for row in rows]
        return [
            (int(row["step"]), row["seconds"], statistics.median(values[max(0, n - SMOOTH) : n]))
            for n, row in enumerate(rows, start=1)
        ]

    def level(self, record: Record, steps: int) -> float:
        """Return what a run has reached after so many steps, NaN if it did not take them."""
        return next((v for step, _, v in reversed(self.reached(record)) if step == steps), math.nan)

    def time_to(self, record: Record, target: float) -> float:
        """Return the seconds until a run is as good as a target, infinite if it never is."""
        sign = 1 if self.higher else -1
        times = (t for _, t, v in self.reached(record) if sign * v >= sign * target)
        return next(times, math.inf)

    def goes_on(self, record: Record, base: Record) -> bool:
        """Whether a run that has taken the base's steps takes some more."""
        if record.error is not None or base.error is not None or not base.is_done:
            return False
        target = self.level(base, base.steps)
        return self.time_to(record, target) == math.inf and record.seconds < base.seconds

    def columns(self, records: Sequence[Record]) -> list[Column]:
        """Return the table's numbers: at the base's last step, and the time to its level there."""
        bases = {r.repeat: r for r in records if r.name == self.base and r.is_done and not r.error}

        def of_base(number: Callable[[Record, Record], float]) -> Callable[[Record], float]:
            return lambda r: number(r, bases[r.repeat]) if r.repeat in bases else math.nan

        def time(record: Record, base: Record) -> float:
            target = self.level(base, base.steps)
            return self.time_to(record, target) / self.time_to(base, target)

        return [
            Column(
                self.label,
                of_base(lambda r, base: self.scale * self.level(r, base.steps)),
                self.text,
            ),
            Column(f"time to {self.base}'s, over {self.base}", of_base(time), "{:.2f}", median_of),
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
        """The plot's panels."""
        return [
            Curve(self.key, self.label),
            Curve(self.key, self.label, x="seconds"),
            Curve("train_loss", "training loss", x="seconds"),
        ]


def run(
    race: Race,
    runs: Sequence[tuple[Record, Iterator[None]]],
    every: int,
    is_over: Callable[[], bool],
) -> Iterator[None]:
    """Let runs take their steps in turn until each is done, and yield after each of all.

    Args:
        race: what they are to reach.
        runs: records, and what takes a step of theirs each time, see `train`.
        every: steps between evaluations, which a run goes on by.
        is_over: whether to stop where all have been evaluated.

    Yields:
        After a step of every run.
    """
    base = next(record for record, _ in runs if record.name == race.base)
    while True:
        for record, _ in runs:
            if record.is_done and race.goes_on(record, base):
                record.total = record.steps + every
        left = [(record, steps) for record, steps in runs if not record.is_done]
        if not left:
            return
        # Those that were left behind when the command was stopped come first.
        behind = min(record.steps for record, _ in left)
        first = behind % len(left)  # nobody's step always follows the same one's
        for record, steps in left[first:] + left[:first]:
            if record.steps == behind:
                next(steps, None)
        yield
        if all(record.steps % every == 0 for record, _ in left) and is_over():
            return
