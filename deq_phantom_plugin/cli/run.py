"""`deq-phantom run` runs a command in which a repository has another gradient method."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .arguments import add_compat, print_shims


def add_to(commands: Any) -> None:
    """Add the command to the commands of a parser."""
    parser = commands.add_parser(
        "run", help="run a command in which a repository has another method; no file is touched"
    )
    parser.set_defaults(run=_run)
    add = parser.add_argument
    add("--grad", required=True, metavar="SPEC", help="the method")
    add("--repo", type=Path, help="the repository; by default the one around the current folder")
    add_compat(parser)
    add("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="such as python train.py")


def _run(args: argparse.Namespace) -> int:
    from ..patching import run

    compat = args.compat or []
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise ValueError("no command to run; expected one after --, such as -- python train.py")
    root = args.repo or run.find_root(Path.cwd())
    matches, changes = run.prepare(root, args.grad, compat)
    for match in matches:
        print(f"deq-phantom: {match.project.name} with {args.grad}", file=sys.stderr)
    print_shims(compat, sys.stderr)
    return run.run(root, args.grad, changes, command, compat)
