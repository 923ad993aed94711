"""The results of the suite, and how they are written: as JSON and as Markdown tables."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deq_phantom_plugin._plumbing.output import write_whole


@dataclass(frozen=True)
class Row:
    """One contender at one piece of work.

    Attributes:
        group: the name of the group.
        work: a description of the work.
        method: the name of the contender.
        peer: whose code it is: "ours", "torchdeq", "silva", "floor" or a repository.
        numbers: the measured numbers by name; empty if the contender did not run.
        missing: the reason why it did not run, or an empty string.
    """

    group: str
    work: str
    method: str
    peer: str
    numbers: dict[str, float] = field(default_factory=dict)
    missing: str = ""


@dataclass(frozen=True)
class RatioRow:
    """The time, or another number, of one contender divided by that of another one.

    Times are compared round by round.

    Attributes:
        group: the name of the group.
        work: a description of the work.
        over: the method in the numerator.
        under: the method in the denominator.
        median: the median over the rounds.
        low: the first quartile.
        high: the third quartile.
        target: the largest ratio that meets the target; None for no target.
        missing: the reason why there is no ratio, or an empty string.
    """

    group: str
    work: str
    over: str
    under: str
    median: float | None = None
    low: float | None = None
    high: float | None = None
    target: float | None = None
    missing: str = ""

    @property
    def verdict(self) -> str:
        """Whether the target is "met" or "missed"; empty without a target or a ratio."""
        if self.median is None or self.target is None:
            return ""
        return "met" if self.median <= self.target else "missed"


@dataclass
class Results:
    """The results of a run of the suite.

    Attributes:
        environment: the versions, the device, the threads, the date and the data.
        rows: the rows, in the order in which they were measured.
        ratios: the ratios, in the same order.
        notes: sentences that a reader of the tables has to know.
    """

    environment: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    ratios: list[RatioRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write the JSON, and the Markdown beside it."""
        content = json.dumps(_finite(dataclasses.asdict(self)), indent=1, allow_nan=False)
        write_whole(path, f"{content}\n".encode())
        write_whole(path.with_suffix(".md"), self.markdown().encode())

    def markdown(self) -> str:
        """Return everything as tables."""
        parts = ["# Benchmarks", _table(["", ""], [[k, str(v)] for k, v in self._about()])]
        parts += self.notes
        if self.ratios:
            parts += ["## Ratios", "Of times taken in the same rounds: median (quartiles)."]
            parts.append(_table(_RATIO_HEADER, [_ratio_cells(ratio) for ratio in self.ratios]))
        for group, work in dict.fromkeys((row.group, row.work) for row in self.rows):
            rows = [row for row in self.rows if (row.group, row.work) == (group, work)]
            parts += [f"## {group}: {work}", _rows_table(rows)]
        return "\n\n".join(parts) + "\n"

    def _about(self) -> list[tuple[str, Any]]:
        return [(key, value) for key, value in self.environment.items() if value is not None]


_RATIO_HEADER = ["group", "work", "this", "over that", "ratio", "target", ""]


def _ratio_cells(ratio: RatioRow) -> list[str]:
    value = f"not available: {ratio.missing}"
    if ratio.median is not None:
        value = f"**{ratio.median:.3f}** ({ratio.low:.3f} to {ratio.high:.3f})"
    target = "" if ratio.target is None else f"<= {ratio.target}"
    return [ratio.group, ratio.work, ratio.over, ratio.under, value, target, ratio.verdict]


def _rows_table(rows: list[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row.numbers))
    spread = {name for name in names if f"{name} q1" in names}
    shown = [name for name in names if not name.endswith((" q1", " q3"))]
    table = []
    for row in rows:
        cells = [row.method, row.peer]
        for name in shown:
            cell = _number(row.numbers.get(name))
            if name in spread and name in row.numbers:
                low, high = (_number(row.numbers[f"{name} {q}"]) for q in ("q1", "q3"))
                cell = f"{cell} ({low} to {high})"
            cells.append(cell)
        if row.missing:
            cells[1] += f"; not available: {row.missing}"
        table.append(cells)
    return _table(["method", "whose", *shown], table)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])


def _finite(value: Any) -> Any:
    """Return a value with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value
