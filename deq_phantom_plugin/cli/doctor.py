"""`deq-phantom doctor`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_to(commands: Any) -> None:
    """Add the command to a parser's."""
    parser = commands.add_parser(
        "doctor", help="what is installed and hooked, and what a repository is recognised as"
    )
    parser.set_defaults(run=_doctor)
    parser.add_argument("repo", type=Path, nargs="?", metavar="REPO")


def _doctor(args: argparse.Namespace) -> int:
    from ..patching.doctor import diagnose

    print(diagnose(args.repo))
    return 0
