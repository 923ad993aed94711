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
    parser.add_argument(
        "--report",
        action="store_true",
        help="what an issue on a wrong gradient needs: the machine, and gradients that are known",
    )


def _doctor(args: argparse.Namespace) -> int:
    from ..patching.doctor import diagnose, issue_report

    print((issue_report if args.report else diagnose)(args.repo))
    return 0
