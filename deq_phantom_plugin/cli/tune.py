"""`deq-phantom tune` chooses a gradient method for the user's own model, see `dpp.tune`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .._plumbing.extras import require
from ..diagnostics import tune
from ..hosts import enabled
from ..strategies import Auto
from .arguments import positive
from .report import build


def add_to(commands: Any) -> None:
    """Add the command to the commands of a parser."""
    parser = commands.add_parser(
        "tune", help="choose the cheapest gradient that is good enough for your own model"
    )
    parser.set_defaults(run=_tune)
    add = parser.add_argument
    add(
        "target",
        metavar="FILE.py:FUNCTION",
        help="a function without arguments that returns (model, batches, loss), as for dpp.tune; "
        "package.module:FUNCTION works too",
    )
    add(
        "--cosine",
        type=float,
        default=0.95,
        help="cosine that 90 %% of the samples are to reach",
    )
    add("--methods", nargs="+", metavar="SPEC", help="choose among these")
    add(
        "--budget",
        type=positive,
        help="the most products, in place of --cosine; the best method within it is chosen",
    )
    add("--out", type=Path, default=Path("runs/tune"), help="folder for results")


def _tune(args: argparse.Namespace) -> int:
    options = {"cosine": args.cosine, "methods": args.methods, "budget": args.budget}
    Auto(**options)  # refuses bad options before the model is built
    require("matplotlib", "viz")
    with enabled():  # a model's constructors may take names
        built = build(args.target, "(model, batches, loss), see dpp.tune")
        report = tune(*built, **options)
    print(report)
    report.save_json(args.out / "tune.json")
    report.save_html(args.out / "tune.html")
    print(f"\nresults: {args.out / 'tune.json'}\npage: {args.out / 'tune.html'}")
    return 0
