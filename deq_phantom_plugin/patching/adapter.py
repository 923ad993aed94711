"""What an adapter of a repository states; nothing here imports the parser."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .._plumbing import entry_points

Mode = Literal["patch", "run"]

IMPORT = "import deq_phantom_plugin.patching"
"""What edited files import, unless their `SeamFile` says otherwise."""

PYTHON, YAML = (".py",), (".yaml", ".yml")
"""How names of files end."""


@dataclass(frozen=True)
class Edit:
    """One change of statements; everything else in the file stays as it is, down to the bytes.

    In YAML, a line `key: value` that goes after the line which begins with the anchor.

    Attributes:
        anchor: how the statement begins; spaces and line breaks do not count.
        new: Python at column 0, with `{grad}` for the spec as a literal.
        where: whether `new` takes the statement's place, or goes before or after it.
        through: the last statement to replace, as it begins; the anchor's own if empty.
        scope: the function that the statement is in, such as "Net.forward"; any if empty.
        mode: "patch" or "run" for an edit that only one of the two needs.
        optional: whether it is left out where there is no such statement. Any other anchor that
            is not there exactly once makes the file an unknown version.
    """

    anchor: str
    new: str
    where: Literal["replace", "before", "after"] = "after"
    through: str = ""
    scope: str = ""
    mode: Mode | None = None
    optional: bool = False


@dataclass(frozen=True)
class SeamFile:
    """A kind of file with a part in the gradient, told by what is in it and not by its name.

    Attributes:
        what: its part, for messages.
        marks: texts that are all in such a file.
        edits: its changes.
        known: functions that are replaced in part, and the fingerprints (`rewrite.fingerprint`)
            of the versions that the edits were written for; any other is refused.
        required: whether a repository without such a file is not this one.
        imports: statements that the changes need at the top.
        endings: how the names of such files end: `PYTHON` or `YAML`.
    """

    what: str
    marks: tuple[str, ...]
    edits: tuple[Edit, ...]
    known: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    required: bool = True
    imports: str = IMPORT
    endings: tuple[str, ...] = PYTHON


@dataclass(frozen=True)
class Project:
    """One code base of a repository.

    Attributes:
        name: such as "locuslab/deq MDEQ-Vision".
        switch: where the patched code base takes a spec, in words.
        files: its seam.
    """

    name: str
    switch: str
    files: tuple[SeamFile, ...]


@dataclass(frozen=True)
class Adapter:
    """What is known of a repository.

    Attributes:
        repository: owner/name on GitHub.
        commits: those that the edits were tried on; others pass if the seam is the same.
        projects: its code bases.
    """

    repository: str
    commits: tuple[str, ...]
    projects: tuple[Project, ...]


def known_adapters() -> Sequence[Adapter]:
    """Return the adapters of all installed packages; warn of each broken entry point."""
    loaded = entry_points.load_working(entry_points.ADAPTERS)
    for name, adapter in loaded.items():
        if not isinstance(adapter, Adapter):
            warnings.warn(f"the entry point {name} is {adapter!r}, no Adapter", stacklevel=2)
    return [adapter for adapter in loaded.values() if isinstance(adapter, Adapter)]
