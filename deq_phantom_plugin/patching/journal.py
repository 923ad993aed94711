"""Writes several files as one: all of them or none, also when the process is killed in between."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .repository import RECORD

_JOURNAL = "journal.json"
_MANIFEST = "manifest.json"


class Interrupted(ValueError):
    """A change of several files that was not finished."""


def read_manifest(root: Path) -> dict[str, Any] | None:
    """Return what was remembered with the last change, None if nothing was.

    Raises:
        Interrupted: if a change was not finished.
        ValueError: if the record cannot be read.
    """
    if (root / RECORD / _JOURNAL).exists():
        raise Interrupted(
            f"a change of {root} was interrupted; `deq-phantom patch {root} --recover` restores "
            "the files as they were before it"
        )
    path = root / RECORD / _MANIFEST
    if not path.exists():
        return None
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; restore the files by git") from None
    return manifest


def commit(root: Path, files: Mapping[str, bytes], manifest: Mapping[str, Any] | None) -> None:
    """Give files new content and remember the manifest: all or nothing.

    Everything is on disk, beside the old, before the first file is replaced; a full disk shows
    by then. An error undoes what was done; a kill leaves a journal for `recover`.

    Args:
        root: the folder, resolved.
        files: new content, by path relative to the root; the files exist.
        manifest: what to remember; None for nothing any more.

    Raises:
        OSError: if something cannot be written; nothing has changed then.
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

    Returns:
        The files that were restored, by path relative to the root.

    Raises:
        OSError: if something cannot be written; `recover` can be called again.
    """
    record = root / RECORD
    journal = record / _JOURNAL
    restored = []
    if journal.exists():
        before = json.loads(journal.read_bytes())
        for path, text in before["files"].items():
            content = base64.b64decode(text)
            if not (root / path).exists() or (root / path).read_bytes() != content:
                _write(record / "old", content)
                if (root / path).exists():
                    shutil.copymode(root / path, record / "old")
                os.replace(record / "old", root / path)
                restored.append(path)
        manifest = before["manifest"]
        _remember(record, None if manifest is None else json.loads(base64.b64decode(manifest)))
        _forget(journal)
    if record.exists():
        _tidy(record)
    return restored


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _remember(record: Path, manifest: Mapping[str, Any] | None) -> None:
    if manifest is None:
        _forget(record / _MANIFEST)
    else:
        _write(record / _MANIFEST, json.dumps(manifest, indent=1).encode())


def _write(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all, and stays through a power cut."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, path)


def _forget(path: Path) -> None:
    path.unlink(missing_ok=True)


def _tidy(record: Path) -> None:
    """Remove what a change leaves behind, and the record if it remembers nothing."""
    for path in record.iterdir():
        if path.name.startswith("new.") or path.name == "old" or path.name.endswith(".part"):
            _forget(path)
    if not (record / _MANIFEST).exists():
        _forget(record / ".gitignore")
        with contextlib.suppress(OSError):  # somebody keeps a file of their own there
            record.rmdir()
