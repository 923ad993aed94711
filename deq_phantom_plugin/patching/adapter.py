"""The classes of which an adapter consists: `Adapter`, `Project`, `SeamFile` and `Edit`.

An adapter describes how one foreign repository is patched. Its *seam* is the set of files and
statements that have a part in the gradient. These classes hold data only. This file does not
import LibCST, the parser, so adapters can be read where LibCST is not installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .._plumbing import entry_points
from .._plumbing.once import warn

Mode = Literal["patch", "run"]

IMPORT = "import deq_phantom_plugin.patching"
"""The statement that is put at the top of an edited file, unless its `SeamFile` has another."""

PYTHON, YAML = (".py",), (".yaml", ".yml")
"""The endings of the names of Python and YAML files."""


@dataclass(frozen=True)
class Edit:
    """One change of a file; every other byte of the file stays as it is.

    In a Python file an edit replaces statements, or inserts statements beside one. In a YAML file
    an edit inserts the line `new`, of the form `key: value`, after the line that begins with
    `anchor`; `where`, `through` and `scope` have no effect there.

    Attributes:
        anchor: the beginning of the statement. Spaces and line breaks are ignored.
        new: the new Python code, at column 0. `{grad}` in it stands for the spec as a literal.
        where: whether `new` replaces the statement, or goes before or after it.
        through: the beginning of the last statement to replace. If it is empty, only the
            statement at the anchor is replaced.
        scope: the class or function whose body holds the statement, such as "Net.forward". If it
            is empty, the statement may be anywhere.
        mode: "patch" or "run" if only one of the two needs this edit; None for both.
        optional: whether the edit is left out if the file has no such statement. Without it, a
            file that does not hold the anchor exactly once is of an unknown version.
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
    """A kind of file that has a part in the gradient; it is recognised by its content.

    Attributes:
        what: the part that the file has, for messages.
        marks: texts that the file contains, every one of them. The name of the file does not count.
        edits: the changes of the file.
        known: the functions of which the edits replace a part, each with the fingerprints
            (`rewrite.fingerprint`) of the versions that the edits were written for. Every other
            version is refused.
        required: whether a folder without such a file is not recognised as the repository.
        imports: statements that the edits need at the top of the file.
        endings: the endings of the names of such files, `PYTHON` or `YAML`.
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
    """One code base of a repository, which may hold several.

    Attributes:
        name: the name of the code base, such as "locuslab/deq MDEQ-Vision".
        switch: where the user writes a spec once the code base is patched, in words.
        files: the seam of the code base.
    """

    name: str
    switch: str
    files: tuple[SeamFile, ...]


@dataclass(frozen=True)
class Adapter:
    """All that is known of one repository.

    Attributes:
        repository: the repository as owner/name on GitHub.
        commits: the commits that the edits were tried on. Other commits are accepted if their seam
            is the same.
        projects: the code bases of the repository.
    """

    repository: str
    commits: tuple[str, ...]
    projects: tuple[Project, ...]


def known_adapters() -> Sequence[Adapter]:
    """Return the adapters of all installed packages, and warn about each broken entry point."""
    loaded = entry_points.load_working(entry_points.ADAPTERS)
    for name, adapter in loaded.items():
        if not isinstance(adapter, Adapter):
            warn(
                f"the entry point {name!r} of {entry_points.ADAPTERS!r} is {adapter!r}; expected "
                "an Adapter. It is ignored, so its repository is not recognised",
            )
    return [adapter for adapter in loaded.values() if isinstance(adapter, Adapter)]
