"""Reads the YAML file of an experiment, and returns the settings of every run.

    repeats: {paper: [0, 1, 2], smoke: [0]}   # seeds, or folds
    select: {smoke: [upg]}                    # the runs of a size; all runs if it is left out
    paper: {lr: 0.1, epochs: 50}              # all settings
    cpu: {epochs: 5}                          # the changes for a smaller size
    smoke: {epochs: 1}
    runs:
      ift: {grad: ift}                        # the changes of a run
      upg: {grad: "upg(k=5, lam=0.5)", smoke: {f_max_iter: 4}}  # its changes for one size

An invalid file raises an error that names the place in the file, and what is accepted there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from deq_phantom_plugin._plumbing.extras import require
from deq_phantom_plugin._plumbing.hints import hint, listed

SIZES = ("smoke", "cpu", "paper")
S = TypeVar("S")


@dataclass(frozen=True)
class Plan(Generic[S]):
    """The runs that are to be trained.

    Attributes:
        name: the name of the experiment, which is the stem of its file.
        size: one of `SIZES`.
        repeats: the seeds or folds with which every run is trained.
        runs: the settings of each run, by its name.
    """

    name: str
    size: str
    repeats: tuple[int, ...]
    runs: dict[str, S]


def load_plan(
    path: Path,
    size: str,
    kind: type[S],
    changes: Mapping[str, Any] = types.MappingProxyType({}),
    runs: Sequence[str] = (),
    repeats: Sequence[int] = (),
) -> Plan[S]:
    """Read the YAML file of an experiment.

    Args:
        path: the YAML file.
        size: one of `SIZES`.
        kind: the dataclass of a run's settings.
        changes: settings that replace those of the file in all runs.
        runs: the names of the runs to keep; if empty, those that the file selects.
        repeats: seeds or folds that replace those of the file.

    Raises:
        ValueError: if a name is unknown, a value has the wrong type, or a setting is missing. The
            message names the place in the file, and what is accepted.
    """
    yaml = require("yaml", "experiments")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} is not YAML: {error}") from None
    _known(content, {"repeats", "select", "runs", *SIZES}, path.name)
    chosen = list(runs) or content.get("select", {}).get(size) or list(content["runs"])
    _known(chosen, content["runs"], "--runs" if runs else f"{path.name}: select")
    found = {}
    for name in chosen:
        merged: dict[str, Any] = {}
        own = dict(content["runs"][name] or {})
        by_size = {key: own.pop(key) for key in SIZES if key in own}
        for where, part in (
            ("paper", content["paper"]),
            *([(size, content.get(size) or {})] if size != "paper" else []),
            (f"runs: {name}", own),
            (f"runs: {name}: {size}", by_size.get(size) or {}),
            ("--set", changes),
        ):
            place = where if where == "--set" else f"{path.name}: {where}"
            _known(part, {field.name for field in dataclasses.fields(kind)}, place)
            merged |= {key: _checked(kind, key, value, place) for key, value in part.items()}
        missing = [
            field.name
            for field in dataclasses.fields(kind)
            if field.name not in merged and field.default is dataclasses.MISSING
        ]
        if missing:
            raise ValueError(
                f"{path.name}: {name}: no {', '.join(missing)}; expected these in the part 'paper' "
                "or in the run"
            )
        found[name] = kind(**merged)
    return Plan(path.stem, size, tuple(repeats or content["repeats"][size]), found)


def parse_change(text: str) -> tuple[str, Any]:
    """Return the key and value of `--set key=value`; the value is YAML.

    Raises:
        ValueError: if there is no equals sign, or if the value is not YAML.
    """
    yaml = require("yaml", "experiments")
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set {text!r}; expected KEY=VALUE, such as epochs=3")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {text!r}: the value is not YAML: {error}") from None


def _known(names: Iterable[str], valid: Iterable[str], place: str) -> None:
    """Raise a ValueError if a name is not valid at a place of the file."""
    for name in names:
        if name not in valid:
            near = hint(name, valid)
            raise ValueError(f"{place}: unknown {name!r}{near}; there are {listed(sorted(valid))}")


def _checked(kind: type, key: str, value: Any, place: str) -> Any:
    """Return a value in the type of its field; lists become tuples, whole numbers become floats."""
    wanted = typing.get_type_hints(kind)[key]
    options = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    for option in options:
        base = typing.get_origin(option) or option
        if base is tuple and isinstance(value, list):
            return tuple(value)
        if base is float and not isinstance(value, bool):
            with contextlib.suppress(TypeError, ValueError):  # YAML reads 1e-3 as a string
                return float(value)
        if isinstance(value, base) and (base is bool or not isinstance(value, bool)):
            return value
    names = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise ValueError(f"{place}: {key}={value!r}; expected {names}")
