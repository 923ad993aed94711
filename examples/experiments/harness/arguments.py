"""The arguments of an experiment's command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .plan import SIZES, Plan, load_plan, parse_change

ROOT = Path("runs/experiments")


def parse(
    file: Path, settings: type, title: str, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, Plan[Any]]:
    """Return the arguments, and the plan that they select.

    Args:
        file: the script of the experiment; the YAML file lies beside it.
        settings: the dataclass of a run's settings.
        title: the title of the experiment.
        argv: the arguments; those of the process if None.
    """
    parser = argparse.ArgumentParser(
        description=sys.modules["__main__"].__doc__ if argv is None else title,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--size", choices=SIZES, default="smoke", help="how much to train (smoke)")
    add("--data", type=Path, help="where the data lie; needed where they are not generated")
    add("--runs", nargs="+", default=[], metavar="NAME", help="only these of the YAML file")
    add("--repeats", nargs="+", type=int, default=[], metavar="N", help="seeds, or folds")
    several = {"nargs": "+", "action": "extend", "default": []}
    add("--set", **several, metavar="KEY=VALUE", help="settings of all runs")
    add("--device", default="auto", help="cpu or cuda (a GPU where there is one)")
    add("--minutes", type=float, default=float("inf"), help="stop then, to be resumed later")
    add("--fresh", action="store_true", help="drop what these runs have done, do not resume")
    add("--time", type=int, default=0, metavar="N", help="N steps of each trained model, in turn")
    add("--out", type=Path, help=f"folder for results ({ROOT}/NAME)")
    also = "results.json of earlier commands, whose finished runs stand beside these"
    add("--also", **several, type=Path, metavar="FILE", help=also)
    args = parser.parse_args(argv)
    try:
        changes = dict(parse_change(text) for text in args.set)
        path = file.with_suffix(".yaml")
        plan = load_plan(path, args.size, settings, changes, args.runs, args.repeats)
        if not args.minutes >= 0 or args.time < 0:
            raise ValueError(f"--minutes {args.minutes} --time {args.time}; expected 0 or more")
        if args.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"--device {args.device}; expected cpu, cuda or auto")
        if args.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda, but PyTorch sees no GPU; expected cpu")
        for name, settings in plan.runs.items():
            base = getattr(settings, "same_time_as", "")
            if base and base not in plan.runs:
                raise ValueError(
                    f"{name} takes the time of {base}; expected {base} among --runs, too"
                )
    except ValueError as error:
        parser.error(str(error))
    return args, plan
