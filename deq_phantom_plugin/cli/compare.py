"""`deq-phantom compare` trains an MDEQ once per gradient method, see the folder `compare`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .._plumbing.extras import require
from ..diagnostics.report import DEFAULT_GRADS
from ..strategies.registry import get_strategy
from .arguments import positive

if TYPE_CHECKING:
    from ..compare import MethodResult


def add_to(commands: Any) -> None:
    """Add the command to the commands of a parser."""
    parser = commands.add_parser(
        "compare", help="train an MDEQ once per method, all else equal, and compare"
    )
    parser.set_defaults(run=_compare)
    add = parser.add_argument
    add("--grad", nargs="+", default=list(DEFAULT_GRADS), metavar="SPEC", help="the methods")
    add("--preset", default="tiny", help="the size of MDEQ: tiny, small, large or xl")
    add("--data", default="digits", help="digits, or a folder of images, one subfolder per class")
    add(
        "--image-size",
        type=positive,
        default=32,
        help="side in pixels to which a folder's images are resized",
    )
    add("--steps", type=positive, default=130, help="optimiser steps")
    add("--batch-size", type=positive, default=64, help="images per step")
    add("--lr", type=float, default=3e-3, help="Adam's largest learning rate")
    add("--seed", type=int, default=0, help="the seed of the initialisation and of the data order")
    add("--device", default="auto", help="cpu, cuda, or auto")
    add("--f-solver", default="anderson", help="TorchDEQ's forward solver")
    add("--f-max-iter", type=positive, default=15, help="its iterations")
    add("--f-tol", type=float, default=1e-3, help="its relative tolerance")
    add("--solve-dtype", help="bfloat16 or float16, for most of each forward solve")
    add("--out", type=Path, default=Path("runs/compare"), help="folder for results")


def _compare(args: argparse.Namespace) -> int:
    from ..compare import Settings, compare, load_digits, load_folder

    for spec in args.grad:
        get_strategy(spec)
    require("torchdeq", "vision")
    require("matplotlib", "viz")
    progress_module = require("rich.progress", "viz")
    device = torch.device(
        args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    )
    data = load_digits() if args.data == "digits" else load_folder(args.data, args.image_size)
    settings = Settings(
        preset=args.preset,
        steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
        device=device,
        deq={
            "f_solver": args.f_solver,
            "f_max_iter": args.f_max_iter,
            "f_tol": args.f_tol,
            "f_stop_mode": "rel",
            "solve_dtype": args.solve_dtype,
        },
    )
    print(
        f"MDEQ-{args.preset} on {data.name}: {len(data.train_labels)} training and "
        f"{len(data.test_labels)} test images, {len(data.classes)} classes, {args.steps} steps of "
        f"{args.batch_size} on {device}"
    )
    results: list[MethodResult] = []
    status, failed = 0, None
    with _progress(progress_module) as progress:
        tasks = [progress.add_task(spec, total=args.steps, loss=float("nan")) for spec in args.grad]

        def on_step(spec: str, step: int, loss: float) -> None:
            progress.update(tasks[len(results)], completed=step, loss=loss)

        try:
            compare(args.grad, data, settings, on_step, results.append)
        except KeyboardInterrupt:
            status = 130
        except Exception as error:  # the methods that are done took their time, too
            failed = error
    try:
        if results:
            _show(results, args, data.name)
    finally:
        if failed is not None:
            raise failed
    return status


def _progress(module: Any) -> Any:
    """Return a progress bar of rich's, which is of no use in a log file and not shown there."""
    columns: list[Any] = [
        module.TextColumn("{task.description}"),
        module.BarColumn(),
        module.MofNCompleteColumn(),
        module.TextColumn("loss {task.fields[loss]:.3f}"),
        module.TimeRemainingColumn(),
    ]
    return module.Progress(*columns, disable=not sys.stdout.isatty())


def _show(results: Sequence[MethodResult], args: argparse.Namespace, data: str) -> None:
    """Print the results and write them into a folder."""
    from ..compare import table, write

    print(table(results, target=0.9 if args.data == "digits" else None))
    plot = write(results, args.out, f"MDEQ-{args.preset} on {data}")
    print(f"results: {args.out / 'results.json'}\nplot: {plot}")
