"""`deq-phantom doctor` prints what is installed and hooked, and recognises a repository."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_to(commands: Any) -> None:
    """Add the command to the commands of a parser."""
    parser = commands.add_parser(
        "doctor", help="what is installed and hooked, and what a repository is recognised as"
    )
    parser.set_defaults(run=_doctor)
    parser.add_argument("repo", type=Path, nargs="?", metavar="REPO")
    parser.add_argument(
        "--report",
        action="store_true",
        help="print what an issue on a wrong gradient needs: the machine, and a check of gradients "
        "that are known in closed form",
    )


def _doctor(args: argparse.Namespace) -> int:
    from ..patching.doctor import diagnose, issue_report

    print((issue_report if args.report else diagnose)(args.repo))
    return 0
