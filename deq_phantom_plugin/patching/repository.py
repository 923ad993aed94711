"""Recognises a repository by the content of its seam, and works out what would change."""

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
"""The folder in a patched repository that remembers what the files were."""

_KEPT = {"checkpoints", "outputs", "wandb"}  # where runs keep copies of the source
SKIPPED = {".git", ".hg", ".svn", RECORD, "__pycache__", "node_modules", ".venv", "venv"} | _KEPT
"""Folders that are no part of the source."""

_PATIENCE = 60  # seconds for git
_LARGEST = 2**24  # bytes; no source with a seam is that long
_HOW = (
    "an adapter is a small object that names the seam, see adapters/repos/ in deq-phantom-plugin; "
    "packages offer theirs through the entry-point group 'deq_phantom_plugin.adapters'"
)


@dataclass(frozen=True)
class Match:
    """A code base that was recognised.

    Attributes:
        adapter: what is known of its repository.
        project: which of its code bases.
        files: its seam, by path relative to the root.
    """

    adapter: Adapter
    project: Project
    files: Mapping[str, SeamFile]


@dataclass(frozen=True)
class Change:
    """One file of a plan: its path relative to the root, as it is, and as it would be."""

    path: str
    old: bytes
    new: bytes


def check_root(root: Path) -> Path:
    """Return the resolved root.

    Raises:
        ValueError: if it is no folder, or lies in a repository that was patched as a whole.
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
        raise ValueError(f"{record} is not a folder; patches are remembered there: move it away")
    return root


def recognise(root: Path, read: Callable[[str], bytes] | None = None) -> list[Match]:
    """Return the code bases found in a folder.

    Args:
        root: the folder, resolved.
        read: returns a file's original content, given its relative path; from disk if None.

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
    """Return what was recognised in a folder and what would change there; writes nothing.

    Args:
        root: the folder, resolved.
        grad: a spec as text.
        mode: for files on disk, or for modules as they load.
        compat: names of shims that patched files apply.
        read: see `recognise`.

    Raises:
        ValueError: if the spec or a shim's name is invalid, nothing is recognised, a seam is of an
            unknown version, or a file lies outside the folder.
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
            + f"\nknown are commits {commits} (`git diff` against one shows what differs); nothing "
            "was changed"
        )
    return matches, [change for change in changes if change.old != change.new]


def check_shims(names: Sequence[str]) -> None:
    """Raise a ValueError if a name is no shim's; lists those there are."""
    for name in names:
        if name not in SHIMS:
            raise ValueError(f"unknown compatibility shim {name!r}; there are {', '.join(SHIMS)}")


def _files(root: Path, endings: tuple[str, ...] = PYTHON) -> Iterator[str]:
    for folder, folders, names in os.walk(root):  # does not follow links to folders
        folders[:] = sorted(name for name in folders if name not in SKIPPED)
        for name in sorted(names):
            path = Path(folder, name)
            if name.endswith(endings) and path.is_file() and path.stat().st_size <= _LARGEST:
                if path.is_symlink() and not path.resolve().is_relative_to(root):
                    continue
                yield path.relative_to(root).as_posix()


def outside_links(root: Path) -> list[str]:
    """Return the files that lie elsewhere and are passed over, by path relative to the root."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED]
        links = (Path(folder, name) for name in names if name.endswith((*PYTHON, *YAML)))
        # A link that leads round in a circle has no `resolve`.
        found += [
            p
            for p in links
            if p.is_symlink() and not Path(os.path.realpath(p)).is_relative_to(root)
        ]
    return sorted(path.relative_to(root).as_posix() for path in found)


def check_unpatched(root: Path, read: Callable[[str], bytes] | None = None) -> None:
    """Refuse a repository without a record of a patch that has parts of one.

    Raises:
        ValueError: names the files.
    """
    read = read or (lambda path: (root / path).read_bytes())
    marked = {path for path in _files(root) if IMPORT.encode() in read(path)}
    marked -= _untracked(root) if marked else set()  # somebody's own
    if marked:
        raise ValueError(
            f"there is no record of a patch of {root}, but these have parts of one: "
            f"{', '.join(sorted(marked))}; restore them by git (git checkout -- FILES); nothing "
            "was changed"
        )


def _untracked(root: Path) -> set[str]:
    """Return the files that git does not know, none where there is no git."""
    answer = git(root, "ls-files", "-z", "--others", "--", "*.py")
    return set(os.fsdecode(answer or b"").split("\0"))


def git(root: Path, *args: str) -> bytes | None:
    """Return what git prints, None where there is no git or no repository.

    A repository's configuration can name programs that git runs when it looks at files
    (`core.fsmonitor`, hooks, filters); none of them is run. The index is not written.

    Raises:
        ValueError: if git does not answer.
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
        raise ValueError(f"git does not answer in {root}; nothing was changed") from None
    return answer.stdout if answer.returncode == 0 else None


def _check_inside(root: Path, path: str) -> None:
    if (root / path).is_symlink():
        raise ValueError(f"{path} is a symbolic link, which is not followed; nothing was changed")


def _check_claims(matches: list[Match]) -> None:
    claims: dict[str, tuple[SeamFile, Match]] = {}
    for match in matches:
        for path, kind in match.files.items():
            other = claims.setdefault(path, (kind, match))
            if other[0] != kind:
                raise ValueError(
                    f"{path} is claimed by {other[1].project.name} and {match.project.name}; "
                    "name the folder of one of them"
                )


def _edited(old: bytes, kind: SeamFile, grad: str, mode: Mode, compat: Sequence[str]) -> bytes:
    from .rewrite import rewrite
    from .settings import insert

    edits = [edit for edit in kind.edits if edit.mode in (None, mode)]
    if kind.endings == YAML:
        return insert(old, _filled(edits, json.dumps(grad)))
    imports = _imports(kind, compat if mode == "patch" else ())
    return rewrite(old, _filled(edits, repr(grad)), imports)


def _filled(edits: Sequence[Edit], grad: str) -> list[Edit]:
    return [replace(edit, new=edit.new.replace("{grad}", grad)) for edit in edits]


def _imports(kind: SeamFile, compat: Sequence[str]) -> str:
    if not compat or not kind.imports:
        return kind.imports
    names = ", ".join(repr(name) for name in compat)
    shims = "deq_phantom_plugin.patching.compat"
    return f"import {shims}\n\n{shims}.apply({names})\n{kind.imports}"
