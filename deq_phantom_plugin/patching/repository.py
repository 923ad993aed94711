"""Recognises a repository by the content of its seam, and works out what would change.

`recognise` compares the Python and YAML files of a folder with the marks of all adapters. `plan`
then applies the edits of the adapters that match, in memory, and refuses versions of the seam for
which the edits were not written. A repository may be hostile: links out of it are not followed, and
git runs no program that the repository names.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..strategies.registry import get_strategy
from .adapter import IMPORT, PYTHON, YAML, Adapter, Edit, Mode, Project, SeamFile, known_adapters
from .compat import SHIMS

RECORD = ".deq-phantom"
"""The record folder of a patched repository, which keeps the original content of its files."""

_KEPT = {"checkpoints", "outputs", "wandb"}  # where runs keep copies of the source
SKIPPED = {".git", ".hg", ".svn", RECORD, "__pycache__", "node_modules", ".venv", "venv"} | _KEPT
"""The names of folders that are not searched, since they do not hold the source."""

_PATIENCE = 60  # seconds for git
_LARGEST = 2**24  # bytes; no source file with a seam is longer
_HOW = (
    "you can write an adapter for it: a small object that names the seam, see adapters/repos/ in "
    "deq-phantom-plugin. Another package registers its adapters in the entry-point group "
    "'deq_phantom_plugin.adapters'"
)


@dataclass(frozen=True)
class Match:
    """A code base that was recognised in a folder.

    Attributes:
        adapter: the adapter of its repository.
        project: the code base.
        files: the files of its seam, by path relative to the root.
    """

    adapter: Adapter
    project: Project
    files: Mapping[str, SeamFile]


@dataclass(frozen=True)
class Change:
    """One change of a plan.

    Attributes:
        path: the path of the file, relative to the root.
        old: the content of the file before the change.
        new: the content after the change.
    """

    path: str
    old: bytes
    new: bytes


def check_root(root: Path) -> Path:
    """Check that a path can be the root of a repository, and return it resolved.

    Raises:
        ValueError: if it is not a folder, or lies in a repository that was patched as a whole.
    """
    if not root.exists():
        raise ValueError(f"there is no {root}; expected the folder of a repository")
    if not root.is_dir():
        raise ValueError(f"{root} is a file; expected the folder of a repository")
    root = root.resolve()
    for folder in root.parents:
        if (folder / RECORD).is_dir():
            raise ValueError(f"{root} is a part of {folder}, which was patched; name that folder")
    record = root / RECORD
    if record.is_symlink() or (record.exists() and not record.is_dir()):
        raise ValueError(
            f"{record} is not a folder, but the record of a patch goes there; move it away"
        )
    return root


def recognise(root: Path, read: Callable[[str], bytes] | None = None) -> list[Match]:
    """Return the code bases that are found in a folder.

    Args:
        root: the folder, resolved.
        read: a function from a relative path to the original content of the file. If it is None,
            files are read from disk.

    Raises:
        ValueError: if two code bases claim one file.
    """
    read = read or (lambda path: (root / path).read_bytes())
    adapters = known_adapters()
    kinds = [
        (kind, tuple(mark.encode() for mark in kind.marks))
        for adapter in adapters
        for project in adapter.projects
        for kind in project.files
    ]
    found: dict[str, list[SeamFile]] = {}
    for path in _files(root, (*PYTHON, *YAML)):
        content = read(path)
        here = [
            kind
            for kind, marks in kinds
            if path.endswith(kind.endings) and all(mark in content for mark in marks)
        ]
        if here:
            found[path] = here
    matches = []
    for adapter in adapters:
        for project in adapter.projects:
            files = {p: k for p, ks in found.items() for k in project.files if k in ks}
            if all(kind in files.values() for kind in project.files if kind.required):
                matches.append(Match(adapter, project, files))
    _check_claims(matches)
    return matches


def plan(
    root: Path,
    grad: str,
    mode: Mode,
    compat: Sequence[str] = (),
    read: Callable[[str], bytes] | None = None,
) -> tuple[list[Match], list[Change]]:
    """Work out what a patch or a run would change in a folder; this function writes nothing.

    Args:
        root: the folder, resolved.
        grad: the spec as text.
        mode: "patch" for files on disk, "run" for modules as they load.
        compat: the names of the shims that patched files apply.
        read: see `recognise`.

    Returns:
        The code bases that were recognised, and the changes of their files.

    Raises:
        ValueError: if the spec or the name of a shim is invalid, if nothing is recognised, if the
            seam is of an unknown version, or if a file of the seam is a symbolic link.
    """
    from .rewrite import SeamError, fingerprint

    get_strategy(grad)
    check_shims(compat)
    read = read or (lambda path: (root / path).read_bytes())
    check_unpatched(root, read)
    matches = recognise(root, read)
    if not matches:
        known = "\n".join(
            f"  {project.name}" for adapter in known_adapters() for project in adapter.projects
        )
        raise ValueError(f"{root} is none of the repositories known:\n{known}\n{_HOW}")
    seam = {path: kind for match in matches for path, kind in match.files.items()}
    changes, unknown = [], []
    for path, kind in seam.items():
        _check_inside(root, path)
        old = read(path)
        for function, versions in kind.known.items():
            version = fingerprint(old, function)
            if version not in versions:
                unknown.append(f"  {path}: {function} is {version or 'not there'}")
        try:
            changes.append(Change(path, old, _edited(old, kind, grad, mode, compat)))
        except SeamError as error:
            unknown.append(f"  {path}: {error}")
    if unknown:
        names = ", ".join(match.project.name for match in matches)
        commits = ", ".join(c[:7] for match in matches for c in match.adapter.commits)
        raise ValueError(
            f"{root} looks like {names}, but its seam is of an unknown version:\n"
            + "\n".join(unknown)
            + "\nThe edits were not written for this version, so nothing was changed. Known are "
            f"the commits {commits}; `git diff` against one of them shows what differs"
        )
    return matches, [change for change in changes if change.old != change.new]


def check_shims(names: Sequence[str]) -> None:
    """Raise a ValueError if a name is not that of a shim; the message lists all shims."""
    for name in names:
        if name not in SHIMS:
            raise ValueError(
                f"unknown compatibility shim {name!r}; expected one of {', '.join(SHIMS)}"
            )


def _files(root: Path, endings: tuple[str, ...] = PYTHON) -> Iterator[str]:
    """Yield the paths of the source files below a folder, relative to it, in a fixed order."""
    for folder, folders, names in os.walk(root):  # does not follow links to folders
        folders[:] = sorted(name for name in folders if name not in SKIPPED)
        for name in sorted(names):
            path = Path(folder, name)
            if name.endswith(endings) and path.is_file() and path.stat().st_size <= _LARGEST:
                if path.is_symlink() and not path.resolve().is_relative_to(root):
                    continue
                yield path.relative_to(root).as_posix()


def outside_links(root: Path) -> list[str]:
    """Return the links to files outside the folder, which are skipped, by relative path."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED]
        links = (Path(folder, name) for name in names if name.endswith((*PYTHON, *YAML)))
        # `Path.resolve` fails for a link that leads in a circle; `os.path.realpath` does not.
        found += [
            p
            for p in links
            if p.is_symlink() and not Path(os.path.realpath(p)).is_relative_to(root)
        ]
    return sorted(path.relative_to(root).as_posix() for path in found)


def check_unpatched(root: Path, read: Callable[[str], bytes] | None = None) -> None:
    """Refuse a repository that holds parts of a patch but no record of it.

    Args:
        root: the folder of the repository, resolved.
        read: see `recognise`.

    Raises:
        ValueError: if there are such files; the message names them.
    """
    read = read or (lambda path: (root / path).read_bytes())
    marked = {path for path in _files(root) if IMPORT.encode() in read(path)}
    marked -= _untracked(root) if marked else set()  # the user's own files may import us
    if marked:
        raise ValueError(
            f"there is no record of a patch of {root}, but these have parts of one: "
            f"{', '.join(sorted(marked))}. A second patch would mix with them, so nothing was "
            "changed; restore them by git first (git checkout -- FILES)"
        )


def _untracked(root: Path) -> set[str]:
    """Return the Python files that git does not track; an empty set without git."""
    answer = git(root, "ls-files", "-z", "--others", "--", "*.py")
    return set(os.fsdecode(answer or b"").split("\0"))


def git(root: Path, *args: str) -> bytes | None:
    """Run git in a folder and return what it prints.

    The configuration of a repository can name programs that git runs when it looks at files
    (`core.fsmonitor`, hooks, filters). None of them is run here. The index is not written.

    Args:
        root: the folder.
        *args: the arguments of git.

    Returns:
        The output of git; None if git is not installed, or if it fails, as it does where there is
        no repository.

    Raises:
        ValueError: if git does not answer within a minute.
    """
    settings = {"core.fsmonitor": "false", "core.hooksPath": os.devnull}
    filters = ["config", "--includes", "--show-scope", "--name-only", "-z", "--get-regexp"]
    fields = os.fsdecode(_git(root, {}, *filters, r"^filter\.") or b"").split("\0")
    for scope, key in zip(fields[::2], fields[1::2], strict=False):
        if scope in ("local", "worktree"):
            settings[key] = ""
            settings[f"{key.rpartition('.')[0]}.required"] = "false"
    return _git(root, settings, *args)


def _git(root: Path, settings: Mapping[str, str], *args: str) -> bytes | None:
    """Run git with some settings overridden, without locks, network or lazy fetches."""
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_NO_LAZY_FETCH": "1"}
    environment["GIT_ALLOW_PROTOCOL"] = "none"
    first = int(environment.get("GIT_CONFIG_COUNT") or 0)
    for number, (key, value) in enumerate(settings.items(), start=first):
        environment[f"GIT_CONFIG_KEY_{number}"] = key
        environment[f"GIT_CONFIG_VALUE_{number}"] = value
    environment["GIT_CONFIG_COUNT"] = str(first + len(settings))
    command = ["git", "-C", str(root), *args]
    try:
        answer = subprocess.run(
            command, env=environment, capture_output=True, check=False, timeout=_PATIENCE
        )
    except FileNotFoundError:
        return None
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"git does not answer in {root} within {_PATIENCE} seconds; nothing was changed. Run "
            "`git status` there to see what it waits for"
        ) from None
    return answer.stdout if answer.returncode == 0 else None


def _check_inside(root: Path, path: str) -> None:
    if (root / path).is_symlink():
        raise ValueError(
            f"{path} is a symbolic link, and links are not patched since their targets may belong "
            "to something else; nothing was changed. Replace it by a copy of its target"
        )


def _check_claims(matches: list[Match]) -> None:
    """Raise a ValueError if two code bases would patch the same file in different ways."""
    claims: dict[str, tuple[SeamFile, Match]] = {}
    for match in matches:
        for path, kind in match.files.items():
            other = claims.setdefault(path, (kind, match))
            if other[0] != kind:
                raise ValueError(
                    f"{path} is claimed by {other[1].project.name} and {match.project.name}, whose "
                    "edits differ; name the folder of one of them"
                )


def _edited(old: bytes, kind: SeamFile, grad: str, mode: Mode, compat: Sequence[str]) -> bytes:
    """Return the content of a file of the seam with the edits of this mode applied."""
    from .rewrite import rewrite
    from .settings import insert

    edits = [edit for edit in kind.edits if edit.mode in (None, mode)]
    if kind.endings == YAML:
        return insert(old, _filled(edits, json.dumps(grad)))
    imports = _imports(kind, compat if mode == "patch" else ())
    return rewrite(old, _filled(edits, repr(grad)), imports)


def _filled(edits: Sequence[Edit], grad: str) -> list[Edit]:
    """Return edits with `{grad}` replaced by a spec, which is written as a literal."""
    return [replace(edit, new=edit.new.replace("{grad}", grad)) for edit in edits]


def _imports(kind: SeamFile, compat: Sequence[str]) -> str:
    """Return the statements for the top of a file, which also apply the shims."""
    if not compat or not kind.imports:
        return kind.imports
    names = ", ".join(repr(name) for name in compat)
    shims = "deq_phantom_plugin.patching.compat"
    return f"import {shims}\n\n{shims}.apply({names})\n{kind.imports}"
