"""One contest: several contenders at the same work, measured in turn."""

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
    """A contender that cannot run here; says why."""


def available(builders: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Yield what can be built here.

    Raises:
        Unavailable: at the end, if something could not; gives the reasons.
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
    """How the suite is run.

    Attributes:
        device: where.
        dtype: of weights, states and data.
        repeats: rounds of each contest.
        quick: tiny sizes, for tests of the suite itself.
        images: an .npz of JPEG images, None for what scikit-learn ships, or random ones.
        graphs: root of PyG's data sets, None for none.
        cache: folder for trained weights.
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
    """Somebody's way to do the work.

    Attributes:
        method: what it is; unique in its contest.
        peer: whose it is.
        make: returns the code that is timed, all preparations done.
        numbers: what is known of it beforehand.
        measure: called once after the contest for more numbers.
        func: f, if it is not the contest's.
    """

    method: str
    peer: str
    make: Callable[[], Run]
    numbers: dict[str, float] = field(default_factory=dict)
    measure: Callable[[], dict[str, float]] = dict
    func: Counted | None = None


@dataclass(frozen=True)
class Ratio:
    """Two methods to compare, and the most that the ratio of their times may be.

    A list of methods stands for the fastest of them. `of` names a number of the rows that is
    compared in place of the time.
    """

    over: str | Sequence[str]
    under: str | Sequence[str]
    target: float | None = None
    of: str | None = None


@dataclass(frozen=True)
class Contest:
    """A piece of work, who competes, and what else is told of each.

    Attributes:
        group: of the suite.
        work: says what the work is.
        contenders: who competes.
        ratios: that are reported.
        func: f, if its evaluations can be counted.
        known: tensors that are there anyway, for the count of bytes; None for no count.
        repeats: the most rounds, where they take long; the settings' if None.
        per_call: how often a contender's code does the work; times are for once.
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
            run()  # the warm-up; a GPU's allocator and a compiler want a second one
            if settings.device.type == "cuda":
                run()
        except Unavailable as reason:
            missing[contender.method] = str(reason)
        except Exception as error:  # a peer may fail in any way, and the others go on
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
    """Return evaluations and bytes, from runs of their own."""
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
