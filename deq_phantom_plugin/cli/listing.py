"""`deq-phantom list` prints every strategy with its arguments and the first line of its text."""

from __future__ import annotations

import argparse
import sys
import textwrap
import warnings
from typing import Any

from ..strategies.registry import get_strategy, list_strategies, strategy_class

_WIDTH = 100  # columns, so that a line fits into a terminal


def add_to(commands: Any) -> None:
    """Add the command to the commands of a parser."""
    parser = commands.add_parser("list", help="print the strategies that are installed")
    parser.set_defaults(run=_list)


def _list(args: argparse.Namespace) -> int:
    with warnings.catch_warnings(record=True) as broken:
        warnings.simplefilter("always")
        names = list_strategies()
    for name in names:
        try:
            shown = repr(get_strategy(name))
        except Exception:  # an argument has no default, or a strategy of another package fails
            shown = f"{name}(...)"
        line = (strategy_class(name).__doc__ or "").strip().partition("\n")[0]
        print("\n".join(textwrap.wrap(shown, _WIDTH, subsequent_indent="  ")))
        for part in textwrap.wrap(line, _WIDTH - 4):
            print(f"    {part}")
    for warning in broken:
        print(f"warning: {warning.message}", file=sys.stderr)
    return 0
