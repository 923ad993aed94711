"""Writes several files as one change: all of them or none, even if the process is killed.

`commit` writes the new content beside the old files and saves the old content in a journal. Only
then does it replace the files. If the process is killed, the journal stays, and `recover` restores
the old content. The record folder `.deq-phantom` of the repository holds the journal, and the
manifest that remembers the last change.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .adapter import PYTHON, YAML
from .repository import RECORD, SKIPPED

_JOURNAL = "journal.json"
_MANIFEST = "manifest.json"


class Interrupted(ValueError):
    """A change of several files was interrupted before it was finished."""


def read_manifest(root: Path) -> dict[str, Any] | None:
    """Return the manifest that the last change saved, or None if there is none.

    Args:
        root: the folder of the repository, resolved.

    Raises:
        Interrupted: if a change was not finished.
        ValueError: if the record cannot be read.
    """
    if os.path.lexists(root / RECORD / _JOURNAL):
        raise Interrupted(
            f"a change of {root} was interrupted, so some of its files may be new and some old; "
            f"`deq-phantom patch {root} --recover` restores all files as they were before it"
        )
    path = root / RECORD / _MANIFEST
    return _loaded(path) if os.path.lexists(path) else None


def commit(root: Path, files: Mapping[str, bytes], manifest: Mapping[str, Any] | None) -> None:
    """Give files new content and save the manifest: all of this or nothing.

    All new content is on disk before the first file is replaced, so a full disk is noticed in time.
    If an error occurs, the change is undone. If the process is killed, the journal stays for
    `recover`.

    Args:
        root: the folder of the repository, resolved.
        files: the new content, by path relative to the root. The files exist already.
        manifest: what to remember of this change; None removes the manifest.

    Raises:
        OSError: if something cannot be written; in that case no file has changed.
    """
    record = root / RECORD
    try:
        record.mkdir(exist_ok=True)
        _write(record / ".gitignore", b"*\n")
        staged = {}
        for number, (path, content) in enumerate(files.items()):
            staged[path] = record / f"new.{number}"
            _write(staged[path], content)
            shutil.copymode(root / path, staged[path])
        old = record / _MANIFEST
        journal = {
            "files": {path: _text((root / path).read_bytes()) for path in files},
            "manifest": _text(old.read_bytes()) if old.exists() else None,
        }
        _write(record / _JOURNAL, json.dumps(journal).encode())
        for path, new in staged.items():
            os.replace(new, root / path)
        _remember(record, manifest)
        _forget(record / _JOURNAL)
        _tidy(record)
    except OSError:
        recover(root)
        raise


def recover(root: Path) -> list[str]:
    """Undo a change that was not finished.

    Args:
        root: the folder of the repository, resolved.

    Returns:
        The paths of the restored files, relative to the root.

    Raises:
        ValueError: if the journal cannot be read.
        OSError: if something cannot be written; `recover` can be called again.
    """
    record = root / RECORD
    journal = record / _JOURNAL
    restored = []
    if os.path.lexists(journal):
        files, manifest = _before(root, _loaded(journal))
        for path, content in files.items():
            if not (root / path).exists() or (root / path).read_bytes() != content:
                _write(record / "old", content)
                if (root / path).exists():
                    shutil.copymode(root / path, record / "old")
                os.replace(record / "old", root / path)
                restored.append(path)
        _remember(record, manifest)
        _forget(journal)
    if record.exists():
        _tidy(record)
    return restored


def contents(root: Path, files: Mapping[str, str]) -> dict[str, bytes]:
    """Return the decoded files of a record, by path relative to the root.

    A record may come with a foreign repository, so its paths are not trusted.

    Args:
        root: the folder of the repository, resolved.
        files: contents in base64, by path relative to the root.

    Raises:
        ValueError: if a path is not that of a Python or YAML file of the repository. A patch
            changes no other files.
    """
    for path in files:
        target = root / path
        if (
            not path.endswith((*PYTHON, *YAML))
            or SKIPPED.intersection(Path(path).parts)
            or not target.is_relative_to(root)
            or os.path.realpath(target) != str(target)
        ):
            raise ValueError(
                f"the record names {path!r}; expected only Python and YAML files of the repository"
            )
    return {path: base64.b64decode(text, validate=True) for path, text in files.items()}


def _loaded(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of the record."""
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path} is not a regular file; restore the repository's files by git")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged: {error}; restore the repository's files by git"
        ) from None
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} is damaged: it holds a {type(found).__name__}, expected a JSON object; "
            "restore the repository's files by git"
        )
    return found


def _before(root: Path, journal: dict[str, Any]) -> tuple[dict[str, bytes], dict[str, Any] | None]:
    """Return the files and the manifest as they were before a change."""
    try:
        manifest = journal["manifest"]
        if manifest is not None:
            manifest = dict(json.loads(base64.b64decode(manifest)))
        return contents(root, journal["files"]), manifest
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"the journal of a change of {root} is damaged: {error!r}; restore its files by git"
        ) from None


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _remember(record: Path, manifest: Mapping[str, Any] | None) -> None:
    if manifest is None:
        _forget(record / _MANIFEST)
    else:
        _write(record / _MANIFEST, json.dumps(manifest, indent=1).encode())


def _write(path: Path, content: bytes) -> None:
    """Write a file completely or not at all; the file survives a power cut."""
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)  # so that no link which lies there is written through
    with open(part, "xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, path)


def _forget(path: Path) -> None:
    path.unlink(missing_ok=True)


def _tidy(record: Path) -> None:
    """Remove temporary files, and the whole record folder if it has no manifest."""
    for path in record.iterdir():
        if path.is_dir() and not path.is_symlink():  # this package creates no folders there
            continue
        if path.name.startswith("new.") or path.name == "old" or path.name.endswith(".part"):
            _forget(path)
    if not (record / _MANIFEST).exists():
        _forget(record / ".gitignore")
        with contextlib.suppress(OSError):  # a user may keep a file of their own there
            record.rmdir()
