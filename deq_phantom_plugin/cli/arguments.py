"""Arguments that several commands share: positive numbers, and `--compat` for old code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any


def positive(text: str) -> int:
    """Return an argument as a whole number of at least 1.

    Raises:
        argparse.ArgumentTypeError: if it is less than 1.
        ValueError: if it is no whole number, which argparse turns into an error.
    """
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}; expected a whole number of at least 1")
    return value


def add_compat(parser: argparse.ArgumentParser) -> None:
    """Add `--compat` to a command."""
    parser.add_argument(
        "--compat",
        type=lambda text: text.split(","),
        action=_Shims,
        metavar="SHIM,...",
        help="shims for old code on today's libraries; `--compat help` lists them",
    )


class _Shims(argparse.Action):
    """Stores names of shims; `help` lists all shims and ends the program, as `--help` does."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        if values == ["help"]:
            from ..patching.compat import SHIMS

            print_shims(list(SHIMS))
            parser.exit()
        setattr(namespace, self.dest, values)


def print_shims(names: Sequence[str], file: Any = None) -> None:
    """Print what each of these shims does.

    Raises:
        ValueError: if a name is that of no shim.
    """
    from ..patching.compat import SHIMS
    from ..patching.repository import check_shims

    check_shims(names)
    for name in names:
        line = (SHIMS[name].__doc__ or "").partition("\n")[0]
        print(f"shim {name}: {line}", file=file or sys.stdout)
