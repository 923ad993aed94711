"""The command line, `deq-phantom`.

Each command has a file, whose `add_to` adds its parser and names the function that runs it. An
error of the user's input is printed as one line, and the exit status is 2.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from .. import __version__
from . import compare, doctor, listing, patch, report, run, tune

__all__ = ["main"]


_CLOSED = 128 + 13  # the exit status of a program that SIGPIPE has ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit status.

    Args:
        argv: the arguments; None for those of the process.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may be any bytes
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # if the reader of a pipe is gone, fail here and not at the exit
    except BrokenPipeError:
        # Discard what is still to be written. Python itself would fail on it at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CLOSED


def _run(argv: Sequence[str] | None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        status: int = args.run(args)
    except (ImportError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except BrokenPipeError:
        raise
    except OSError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deq-phantom", description="Switch the gradient method of an equilibrium by name."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in (listing, report, tune, compare, patch, run, doctor):
        command.add_to(commands)
    return parser
