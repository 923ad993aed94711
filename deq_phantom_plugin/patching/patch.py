"""Patches the files of a repository, and reverts the patch: the engine of `deq-phantom patch`.

`prepare` works out what would change, `apply` writes it, and `revert` restores the original files
byte for byte. The original content is kept in the record folder of the repository. `journal`
writes the files, all of them or none.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import journal
from .repository import RECORD, Change, Match, check_root, check_unpatched, git, plan


@dataclass(frozen=True)
class Patched:
    """The record of a patched repository.

    Attributes:
        grad: the spec that is the default of the patched repository.
        compat: the names of the shims that its files apply.
        projects: the names of its patched code bases.
        originals: the content of each file before the patch, by path relative to the root.
        digests: the SHA-256 of the patched content of each file, by path relative to the root.
    """

    grad: str
    compat: tuple[str, ...]
    projects: tuple[str, ...]
    originals: Mapping[str, bytes]
    digests: Mapping[str, str]

    def changed(self, root: Path) -> list[str]:
        """Return the paths of the files that have changed since the patch."""
        return [
            path
            for path, digest in self.digests.items()
            if not (root / path).is_file() or _digest((root / path).read_bytes()) != digest
        ]

    def original(self, root: Path) -> Callable[[str], bytes]:
        """Return a function from a relative path to the content of that file before the patch."""
        return lambda path: (
            self.originals[path] if path in self.originals else (root / path).read_bytes()
        )


def status(root: Path) -> Patched | None:
    """Return the record of the patch of a repository, or None if it is not patched.

    Args:
        root: the folder of the repository, resolved.

    Raises:
        Interrupted: if a patch or its revert was not finished.
        ValueError: if the record cannot be read.
    """
    manifest = journal.read_manifest(root)
    if manifest is None:
        return None
    try:
        patched = Patched(
            grad=str(manifest["grad"]),
            compat=tuple(map(str, manifest["compat"])),
            projects=tuple(manifest["projects"]),
            originals=journal.contents(root, manifest["originals"]),
            digests=dict(manifest["digests"]),
        )
        if patched.originals.keys() != patched.digests.keys():
            raise ValueError("its originals and its digests are of different files")
        return patched
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the record of the patch of {root} is damaged: {error!r}; restore its files by git "
            f"and delete {RECORD}"
        ) from None


def prepare(
    root: Path, grad: str, compat: Sequence[str] | None = None
) -> tuple[list[Match], list[Change], dict[str, Any]]:
    """Work out what a patch would change; this function writes nothing.

    If the repository is patched already, the plan starts from its original files. So the new spec
    replaces the old one.

    Args:
        root: the folder of the repository.
        grad: the spec as text, which becomes the default of the patched repository.
        compat: the names of the shims that its files apply; None for those of an earlier patch.

    Returns:
        The code bases that were recognised, the changes of files, and the manifest to save.

    Raises:
        ValueError: see `plan`; also if files were changed since the last patch, or have uncommitted
            changes.
    """
    root = check_root(root)
    patched = status(root)
    if compat is None:
        compat = () if patched is None else patched.compat
    if patched is None:
        matches, changes = plan(root, grad, "patch", compat)
        check_committed(root, [change.path for change in changes])
        now = {change.path: change.old for change in changes}
    else:
        _check_unchanged(root, patched)
        matches, changes = plan(root, grad, "patch", compat, patched.original(root))
        # A file that only the first patch has changed goes back to its original content.
        planned = {change.path for change in changes}
        changes += [
            Change(path, content, content)
            for path, content in patched.originals.items()
            if path not in planned
        ]
        now = {change.path: (root / change.path).read_bytes() for change in changes}
    manifest = {
        "grad": grad,
        "compat": list(compat),
        "projects": [match.project.name for match in matches],
        "originals": {c.path: base64.b64encode(c.old).decode() for c in changes if c.old != c.new},
        "digests": {c.path: _digest(c.new) for c in changes if c.old != c.new},
    }
    steps = [Change(c.path, now[c.path], c.new) for c in changes if now[c.path] != c.new]
    return matches, steps, manifest


def apply(root: Path, steps: Sequence[Change], manifest: Mapping[str, Any]) -> None:
    """Write the changes that `prepare` returned: all files or none.

    Args:
        root: the folder of the repository.
        steps: the changes.
        manifest: the manifest.

    Raises:
        OSError: if something cannot be written; nothing has changed then.
    """
    if steps:
        journal.commit(check_root(root), {step.path: step.new for step in steps}, manifest)


def revert(root: Path) -> list[str]:
    """Restore the original files byte for byte.

    Args:
        root: the folder of the repository.

    Returns:
        The paths of the restored files, relative to the root; empty if nothing was patched.

    Raises:
        ValueError: if a file was changed since it was patched, or the record of the patch is gone.
        OSError: if something cannot be written; in that case no file has changed.
    """
    root = check_root(root)
    patched = status(root)
    if patched is None:
        check_unpatched(root)
        return []
    _check_unchanged(root, patched)
    journal.commit(root, patched.originals, None)
    return sorted(patched.originals)


def recover(root: Path) -> list[str]:
    """Undo a patch, or a revert, that was interrupted.

    Args:
        root: the folder of the repository.

    Returns:
        The paths of the restored files, relative to the root.

    Raises:
        ValueError: if the record of a patch is gone or damaged.
        OSError: if something cannot be written; `recover` can be called again.
    """
    root = check_root(root)
    restored = journal.recover(root)
    if not restored and status(root) is None:
        check_unpatched(root)
    return restored


def diff(steps: Sequence[Change]) -> str:
    """Return changes as a unified diff."""
    parts = []
    for step in steps:
        old, new = (
            content.decode("utf-8", "replace").splitlines(keepends=True)
            for content in (step.old, step.new)
        )
        for line in difflib.unified_diff(old, new, f"a/{step.path}", f"b/{step.path}"):
            whole = line if line.endswith("\n") else line + "\n\\ No newline at end of file\n"
            parts.append(whole)
    return "".join(parts)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _check_unchanged(root: Path, patched: Patched) -> None:
    changed = patched.changed(root)
    if changed:
        raise ValueError(
            f"changed since {root} was patched with {patched.grad}: {', '.join(changed)}. Your "
            "changes would be lost, so nothing was done. Undo them first, or restore all of "
            f"{', '.join(patched.digests)} by git and delete {RECORD}"
        )


def check_committed(root: Path, paths: Sequence[str]) -> None:
    """Raise a ValueError if files have uncommitted changes; without git, check nothing."""
    status = ("status", "--porcelain", "-z", "--ignore-submodules=all", "--", *paths)
    answer = git(root, "--literal-pathspecs", *status)
    if answer:
        lines = [line for line in os.fsdecode(answer).split("\0") if line]
        raise ValueError(
            f"uncommitted changes in {root}: {', '.join(line[3:] for line in lines)}; commit or "
            "stash them first; nothing was changed"
        )
