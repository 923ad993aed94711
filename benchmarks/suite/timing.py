"""Times several pieces of code in turn, so that a slow minute affects all of them equally."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[[], Any]
Stopwatch = Callable[[Run], float]
"""Runs a piece of code and returns the seconds it took."""


@dataclass(frozen=True)
class Spread:
    """The median and the quartiles of some numbers.

    Attributes:
        median: the median.
        low: the first quartile.
        high: the third quartile.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Spread:
        """Return the spread of one or more numbers."""
        if len(numbers) == 1:
            return cls(numbers[0], numbers[0], numbers[0])
        low, median, high = statistics.quantiles(numbers, n=4, method="inclusive")
        return cls(median, low, high)


def stopwatch(device: torch.device) -> Stopwatch:
    """Return a stopwatch for a device: CUDA events on a GPU, the wall clock elsewhere."""
    if device.type != "cuda":

        def on_host(run: Run) -> float:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start

        return on_host

    def on_device(run: Run) -> float:
        torch.cuda.synchronize(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1000

    return on_device


def interleave(runs: Mapping[str, Run], repeats: int, measure: Stopwatch) -> dict[str, list[float]]:
    """Time each piece of code once per round, and return the seconds of all rounds.

    The order rotates: A B C, B C A, C A B, ... So the first one of a round is not always the same.

    Args:
        runs: the pieces of code by name.
        repeats: the number of rounds.
        measure: runs a piece of code and returns its seconds.
    """
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        shift = turn % len(names) if names else 0
        for name in names[shift:] + names[:shift]:
            seconds[name].append(measure(runs[name]))
    return seconds


def paired_ratio(over: Sequence[float], under: Sequence[float]) -> Spread:
    """Return the spread of the ratios of times that were taken in the same round."""
    return Spread.of([a / b for a, b in zip(over, under, strict=True)])
