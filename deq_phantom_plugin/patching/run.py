"""Runs a command with a repository patched in memory: no file of it is touched."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .compat import LIBRARY
from .equilibrium import RUN_GRAD
from .patch import status
from .repository import RECORD, Change, Match, check_root, plan


def find_root(start: Path) -> Path:
    """Return the innermost folder around `start` that is a repository, `start` if none is."""
    for folder in (start, *start.parents):
        if (folder / ".git").exists() or (folder / RECORD).is_dir():
            return folder
    return start


def prepare(root: Path, grad: str, compat: Sequence[str] = ()) -> tuple[list[Match], list[Change]]:
    """Return what a run would recognise and change in memory.

    Args:
        root: the folder of the repository.
        grad: a spec as text.
        compat: names of shims.

    Raises:
        ValueError: see `plan`.
    """
    root = check_root(root)
    patched = status(root)
    return plan(root, grad, "run", compat, patched.original(root) if patched else None)


def run(
    root: Path,
    grad: str,
    changes: Sequence[Change],
    command: Sequence[str],
    compat: Sequence[str] = (),
) -> int:
    """Run a command in which the modules of a repository load with their changes.

    The processes that it starts are covered too, as long as they inherit the environment and do not
    run Python isolated (`-I`, `-E`).

    Args:
        root: the folder of the repository.
        grad: the spec; it also wins over what scripts of a patched repository have themselves.
        changes: see `prepare`.
        command: the command and its arguments.
        compat: names of shims.

    Returns:
        Its exit status; 128 + n if signal n ended it, 127 if there is no such command.
    """
    root = check_root(root)
    folder = Path(tempfile.mkdtemp(prefix="deq-phantom-"))
    try:
        _write(folder, root, changes, compat)
        paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), RUN_GRAD: grad}
        code = _call(command, environment)
        if code == 0 and changes and not list(folder.glob("*.loaded")):
            files = ", ".join(change.path for change in changes)
            print(
                f"deq-phantom: warning: no changed module was imported ({files}); did the command "
                f"run code of {root}?",
                file=sys.stderr,
            )
        return code
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(folder: Path, root: Path, changes: Sequence[Change], compat: Sequence[str]) -> None:
    files = {}
    for number, change in enumerate(changes):
        (folder / f"{number}.py").write_bytes(change.new)
        path = root / change.path
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        files[os.path.realpath(path)] = {"source": f"{number}.py", "digest": digest}
    shims: dict[str, list[str]] = {}
    for name in compat:
        if name in LIBRARY:
            shims.setdefault(LIBRARY[name], []).append(name)
    stubs = [name for name in compat if name not in LIBRARY]
    content: dict[str, Any] = {"files": files, "shims": shims, "stubs": stubs}
    (folder / "plan.json").write_text(json.dumps(content), encoding="utf-8")
    here = Path(__file__).parent
    shutil.copyfile(here / "inject.py", folder / "sitecustomize.py")
    shutil.copyfile(here / "compat.py", folder / "_deq_phantom_compat.py")


def _call(command: Sequence[str], environment: dict[str, str]) -> int:
    try:
        process = subprocess.Popen(command, env=environment)
    except (FileNotFoundError, PermissionError, NotADirectoryError) as error:
        print(f"deq-phantom: error: cannot run {command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    with _passed_on(process):
        while True:
            try:
                code = process.wait()
                break
            except KeyboardInterrupt:  # the command has it too, and decides
                continue
    return 128 - code if code < 0 else code


@contextlib.contextmanager
def _passed_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Pass signals on that schedulers send to one process alone; a terminal's Ctrl-C is not."""
    names = [name for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in names:
            number = getattr(signal, name)
            before[number] = signal.signal(
                number, lambda received, frame: process.send_signal(received)
            )
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
