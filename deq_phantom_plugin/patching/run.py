"""Runs a command with a repository patched in memory: the engine of `deq-phantom run`.

No file of the repository changes. `run` writes the patched sources into a temporary folder, and
`inject`, which is copied there as `sitecustomize.py`, loads them in place of the originals.
"""

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
    """Return the innermost repository that contains `start`, or `start` if there is none."""
    for folder in (start, *start.parents):
        if (folder / ".git").exists() or (folder / RECORD).is_dir():
            return folder
    return start


def prepare(root: Path, grad: str, compat: Sequence[str] = ()) -> tuple[list[Match], list[Change]]:
    """Work out what a run would change in memory.

    Args:
        root: the folder of the repository.
        grad: the spec as text.
        compat: the names of the shims to apply.

    Returns:
        The code bases that were recognised, and the changes of their modules.

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

    The changes also act in the processes that the command starts, as long as they inherit the
    environment and do not run Python in isolated mode (`-I`, `-E`).

    Args:
        root: the folder of the repository.
        grad: the spec. It also takes precedence over the spec that the scripts of a patched
            repository choose.
        changes: the changes that `prepare` returned.
        command: the command and its arguments.
        compat: the names of the shims to apply.

    Returns:
        The exit status of the command; 128 + n if signal n ended it, 127 if it could not be
        started.
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
                f"deq-phantom: warning: no changed module was imported ({files}), so --grad had no "
                f"effect. Check that the command runs the code of {root}",
                file=sys.stderr,
            )
        return code
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(folder: Path, root: Path, changes: Sequence[Change], compat: Sequence[str]) -> None:
    """Write the patched sources, the plan for `inject`, and `inject` itself into a folder."""
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
    """Run a command, pass signals on to it, and return its exit status as a shell would."""
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
            except KeyboardInterrupt:  # the command receives it as well, and decides what to do
                continue
    return 128 - code if code < 0 else code


@contextlib.contextmanager
def _passed_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Pass on the signals that a scheduler sends to this process only.

    A terminal sends Ctrl-C to both processes, so this signal is not passed on.
    """
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
