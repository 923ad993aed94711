"""Runs a contest: several contenders do the same work in turn, and are measured.

`hold` warms all contenders up, times them in turn, counts what they use, and adds rows and ratios
to the results. A contender that cannot run gets a row that says why.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from deq_phantom_plugin.diagnostics.measure.cost import peak_bytes

from .accounting import MIB, Counted, saved_bytes
from .report import RatioRow, Results, Row
from .timing import Run, Spread, interleave, paired_ratio, stopwatch

T = TypeVar("T")


class Unavailable(Exception):
    """A contender, or a group, cannot run here; the message says why."""


def available(builders: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Yield what can be built on this machine.

    Raises:
        Unavailable: at the end, if something could not be built; the message has the reasons.
    """
    reasons: dict[str, None] = {}
    for build in builders:
        try:
            yield build()
        except Unavailable as reason:
            reasons[str(reason)] = None
    if reasons:
        raise Unavailable("; ".join(reasons))


@dataclass(frozen=True)
class Settings:
    """The settings of a run of the suite.

    Attributes:
        device: the device on which all contenders run.
        dtype: the dtype of weights, states and data.
        repeats: the number of rounds of each contest.
        quick: whether sizes are tiny, for tests of the suite itself.
        images: an .npz file of JPEG images. If it is None, scikit-learn's digits are used, or
            random images without scikit-learn.
        graphs: the root folder of PyG's data sets; None if there is none.
        cache: the folder for trained weights.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    repeats: int = 11
    quick: bool = False
    images: Path | None = None
    graphs: Path | None = None
    cache: Path = Path("runs/bench")


@dataclass(frozen=True)
class Contender:
    """One way to do the work of a contest.

    Attributes:
        method: the name of the way, which is unique in its contest.
        peer: whose code it is, see `Row`.
        make: prepares everything, and returns the code that is timed.
        numbers: numbers that are known before the contest, or that `make` fills in.
        measure: returns more numbers; it is called once after the contest.
        func: f, if it is not that of the contest.
    """

    method: str
    peer: str
    make: Callable[[], Run]
    numbers: dict[str, float] = field(default_factory=dict)
    measure: Callable[[], dict[str, float]] = dict
    func: Counted | None = None


@dataclass(frozen=True)
class Ratio:
    """Two methods whose times are compared.

    Attributes:
        over: the method in the numerator. A list stands for the fastest of its methods.
        under: the method in the denominator, or a list.
        target: the largest ratio that meets the target; None for no target.
        of: the name of a number of the rows that is compared in place of the time.
    """

    over: str | Sequence[str]
    under: str | Sequence[str]
    target: float | None = None
    of: str | None = None


@dataclass(frozen=True)
class Contest:
    """A piece of work and its contenders.

    Attributes:
        group: the name of the group.
        work: a description of the work.
        contenders: the contenders.
        ratios: the ratios that are reported.
        func: f, if its evaluations can be counted.
        known: tensors that exist in any case, for the count of bytes; None for no count.
        repeats: the largest number of rounds, for work that takes long; None for the settings'.
        per_call: how often a contender's code does the work. Times are divided by it.
    """

    group: str
    work: str
    contenders: Sequence[Contender]
    ratios: Sequence[Ratio] = ()
    func: Counted | None = None
    known: Sequence[Tensor] | None = None
    repeats: int | None = None
    per_call: int = 1


def hold(contest: Contest, settings: Settings, results: Results) -> None:
    """Run a contest, and add what it found to the results."""
    print(f"{contest.group}: {contest.work}", file=sys.stderr, flush=True)
    runs: dict[str, Run] = {}
    missing: dict[str, str] = {}
    for contender in contest.contenders:
        try:
            run = contender.make()
            run()  # warms up; on a GPU, the allocator and a compiler need a second time
            if settings.device.type == "cuda":
                run()
        except Unavailable as reason:
            missing[contender.method] = str(reason)
        except Exception as error:  # other packages may fail in any way; the contest goes on
            missing[contender.method] = f"{type(error).__name__}: {error}".partition("\n")[0]
            print(f"  {contender.method}: {missing[contender.method]}", file=sys.stderr)
        else:
            runs[contender.method] = run
    repeats = min(settings.repeats, contest.repeats or settings.repeats)
    seconds = interleave(runs, repeats, stopwatch(settings.device))
    for contender in contest.contenders:
        numbers: dict[str, float] = {}
        if contender.method in runs:
            times = Spread.of([1000 * s / contest.per_call for s in seconds[contender.method]])
            numbers = {"ms": times.median, "ms q1": times.low, "ms q3": times.high}
            numbers |= contender.numbers
            numbers |= _spent(contest, contender, runs[contender.method], settings.device)
            numbers |= contender.measure()
        results.rows.append(
            Row(
                contest.group,
                contest.work,
                contender.method,
                contender.peer,
                numbers,
                missing.get(contender.method, ""),
            )
        )
    rows = {row.method: row.numbers for row in results.rows if row.work == contest.work}
    for ratio in contest.ratios:
        measured = seconds
        if ratio.of is not None:
            measured = {name: [rows[name][ratio.of]] for name in seconds}
        results.ratios.append(_ratio(contest, ratio, measured, missing))


def _spent(
    contest: Contest, contender: Contender, run: Run, device: torch.device
) -> dict[str, float]:
    """Return evaluations, backward passes and bytes, counted in separate runs."""
    numbers: dict[str, float] = {}
    func = contender.func or contest.func
    if func is not None:
        with func.count():
            run()
        numbers |= {"f": func.evaluations, "VJPs": func.backwards}
    if contest.known is not None:
        numbers["saved MiB"] = saved_bytes(run, contest.known) / MIB
        numbers["peak MiB"] = peak_bytes(run, device) / MIB
    return numbers


def _ratio(
    contest: Contest, ratio: Ratio, seconds: dict[str, list[float]], missing: dict[str, str]
) -> RatioRow:
    """Return a ratio of the methods that ran, or a row that says which one is missing."""

    def fastest(names: str | Sequence[str]) -> str:
        names = [names] if isinstance(names, str) else list(names)
        ran = [name for name in names if name in seconds]
        return min(ran or names[:1], key=lambda name: Spread.of(seconds.get(name, [0])).median)

    over, under = fastest(ratio.over), fastest(ratio.under)
    what = "" if ratio.of is None else f", {ratio.of}"
    found: dict[str, Any] = {"target": ratio.target}
    absent = [name for name in (over, under) if name not in seconds]
    if absent:
        found["missing"] = f"{absent[0]}: {missing[absent[0]]}"
    else:
        spread = paired_ratio(seconds[over], seconds[under])
        found |= {"median": spread.median, "low": spread.low, "high": spread.high}
    labels = [
        f"{name}{what}" if isinstance(names, str) else f"best of {len(names)}: {name}{what}"
        for name, names in ((over, ratio.over), (under, ratio.under))
    ]
    return RatioRow(contest.group, contest.work, *labels, **found)
