"""Programs in `drivers/` that run in several processes, on gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed

needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this PyTorch has no gloo",
)


def run(
    driver: Path,
    *arguments: object,
    processes: int | None = 2,
    options: Sequence[str] = (),
    seconds: float = 600,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run a program by torchrun, or alone if `processes` is None, and return how it ended."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [
            sys.executable,
            *(() if processes is None else (*launcher, *options)),
            str(driver),
            *map(str, arguments),
        ],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        env={**os.environ, **environment},
    )


def found(driver: Path, out: Path, *arguments: object, **options: Any) -> Any:
    """Return what a program has written, as JSON, to the file that it was given."""
    ended = run(driver, out, *arguments, **options)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(out.read_text())
