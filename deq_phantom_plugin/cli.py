"""The command line: `deq-phantom list`, `report`, `compare`, `patch`, `run` and `doctor`."""

from __future__ import annotations

import argparse
import importlib.util
import io
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ._plumbing.extras import require
from .diagnostics import model_report
from .diagnostics.report import DEFAULT_GRADS
from .strategies.registry import get_strategy, list_strategies, strategy_class


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status.

    Args:
        argv: arguments, those of the process if None.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may be any bytes
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        status: int = args.run(args)
    except (ImportError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except OSError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deq-phantom", description="Switch the gradient method of an equilibrium by name."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    listing = commands.add_parser("list", help="print the strategies that are installed")
    listing.set_defaults(run=_list)
    report = commands.add_parser(
        "report", help="measure gradient methods on your own model and batch, against the exact one"
    )
    report.set_defaults(run=_report)
    report.add_argument(
        "target",
        metavar="FILE.py:FUNCTION",
        help="a function without arguments that returns (model, inputs, loss), as for "
        "dpp.model_report; package.module:FUNCTION works too",
    )
    report.add_argument("--grad", nargs="+", default=list(DEFAULT_GRADS), metavar="SPEC")
    report.add_argument("--repeats", type=_positive, default=3, help="timed runs of each method")
    report.add_argument("--out", type=Path, default=Path("runs/report"), help="folder for results")
    compare = commands.add_parser(
        "compare", help="train an MDEQ once per method, all else equal, and compare"
    )
    compare.set_defaults(run=_compare)
    add = compare.add_argument
    add("--grad", nargs="+", default=["ift", "upg", "npg", "jfb"], metavar="SPEC", help="methods")
    add("--preset", default="tiny", help="of MDEQ: tiny, small, large or xl")
    add("--data", default="digits", help="digits, or a folder of images, one subfolder a class")
    add("--image-size", type=_positive, default=32, help="side that a folder's images get")
    add("--steps", type=_positive, default=130, help="optimiser steps")
    add("--batch-size", type=_positive, default=64)
    add("--lr", type=float, default=3e-3, help="Adam's largest learning rate")
    add("--seed", type=int, default=0, help="of the initialisation and the data order")
    add("--device", default="auto", help="cpu, cuda, or auto")
    add("--f-solver", default="anderson", help="TorchDEQ's forward solver")
    add("--f-max-iter", type=_positive, default=15, help="its iterations")
    add("--f-tol", type=float, default=1e-3, help="its relative tolerance")
    add("--out", type=Path, default=Path("runs/compare"), help="folder for results")
    _add_patching(commands)
    return parser


def _add_patching(commands: Any) -> None:
    patch = commands.add_parser(
        "patch", help="make an existing repository take gradient methods by name"
    )
    patch.set_defaults(run=_patch)
    add = patch.add_argument
    add("repo", type=Path, metavar="REPO", help="its folder, or a part of it")
    action = patch.add_mutually_exclusive_group(required=True)
    action.add_argument("--grad", metavar="SPEC", help="the method it has unless told otherwise")
    action.add_argument("--revert", action="store_true", help="restore the files byte for byte")
    action.add_argument(
        "--recover", action="store_true", help="undo a patch or revert that was interrupted"
    )
    add("--dry-run", action="store_true", help="show the changes, write nothing")
    _add_compat(patch)
    run = commands.add_parser(
        "run", help="run a command in which a repository has another method; no file is touched"
    )
    run.set_defaults(run=_run)
    add = run.add_argument
    add("--grad", required=True, metavar="SPEC", help="the method")
    add("--repo", type=Path, help="the repository; the one around the current folder if left out")
    _add_compat(run)
    add("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="such as python train.py")
    doctor = commands.add_parser(
        "doctor", help="what is installed and hooked, and what a repository is recognised as"
    )
    doctor.set_defaults(run=_doctor)
    doctor.add_argument("repo", type=Path, nargs="?", metavar="REPO")


def _add_compat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--compat",
        type=lambda text: text.split(","),
        action=_Shims,
        metavar="SHIM,...",
        help="shims for old code on today's libraries; `--compat help` lists them",
    )


class _Shims(argparse.Action):
    """Names of shims; `help` lists them and ends, as `--help` does."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        if values == ["help"]:
            from .patching.compat import SHIMS

            _print_shims(list(SHIMS))
            parser.exit()
        setattr(namespace, self.dest, values)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}; expected a whole number of at least 1")
    return value


def _list(args: argparse.Namespace) -> int:
    with warnings.catch_warnings(record=True) as broken:
        warnings.simplefilter("always")
        names = list_strategies()
    rows = []
    for name in names:
        try:
            shown = repr(get_strategy(name))
        except Exception:  # has arguments without a default, or is somebody's that fails
            shown = f"{name}(...)"
        rows.append((shown, (strategy_class(name).__doc__ or "").strip().partition("\n")[0]))
    width = max(len(shown) for shown, _ in rows)
    for shown, line in rows:
        print(f"{shown:{width}}  {line}")
    for warning in broken:
        print(f"warning: {warning.message}", file=sys.stderr)
    return 0


def _report(args: argparse.Namespace) -> int:
    for spec in args.grad:
        get_strategy(spec)
    require("matplotlib", "viz")
    built = _load(args.target)()
    if not isinstance(built, tuple) or len(built) != 3:
        raise ValueError(
            f"{args.target} returned {type(built).__name__}; expected (model, inputs, loss)"
        )
    model, inputs, loss = built
    report = model_report(model, inputs, loss, args.grad, repeats=args.repeats)
    print(report)
    report.save_json(args.out / "report.json")
    report.save_html(args.out / "report.html")
    print(f"\nresults: {args.out / 'report.json'}\npage: {args.out / 'report.html'}")
    return 0


def _load(target: str) -> Callable[[], Any]:
    """Return the function that FILE.py:FUNCTION or package.module:FUNCTION names.

    Raises:
        ValueError: if there is no such file, module or function.
    """
    source, _, name = target.rpartition(":")
    if not source or not name.isidentifier():
        raise ValueError(f"{target!r}; expected FILE.py:FUNCTION or package.module:FUNCTION")
    if source.endswith(".py"):
        module = _run_file(Path(source))
    else:
        sys.path.insert(0, str(Path.cwd()))
        try:
            module = importlib.import_module(source)
        except ModuleNotFoundError as error:
            if error.name != source.partition(".")[0]:
                raise
            raise ValueError(f"{target!r}: there is no module {source}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{target!r}: {source} has no function {name}")
    return function  # type: ignore[no-any-return]


def _run_file(path: Path) -> ModuleType:
    """Return a script as a module, whatever else is called like it."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    sys.path.insert(0, str(path.resolve().parent))  # as for any script, for its own imports
    spec = importlib.util.spec_from_file_location(f"deq_phantom_target_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where pickle and dataclasses look
    spec.loader.exec_module(module)
    return module


def _compare(args: argparse.Namespace) -> int:
    from .compare import MethodResult, Settings, compare, load_digits, load_folder, table, write

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
        },
    )
    print(
        f"MDEQ-{args.preset} on {data.name}: {len(data.train_labels)} training and "
        f"{len(data.test_labels)} test images, {len(data.classes)} classes, {args.steps} steps of "
        f"{args.batch_size} on {device}"
    )
    results: list[MethodResult] = []
    status = 0
    columns: list[Any] = [
        progress_module.TextColumn("{task.description}"),
        progress_module.BarColumn(),
        progress_module.MofNCompleteColumn(),
        progress_module.TextColumn("loss {task.fields[loss]:.3f}"),
        progress_module.TimeRemainingColumn(),
    ]
    with progress_module.Progress(*columns) as progress:
        tasks = [progress.add_task(spec, total=args.steps, loss=float("nan")) for spec in args.grad]

        def on_step(spec: str, step: int, loss: float) -> None:
            progress.update(tasks[len(results)], completed=step, loss=loss)

        try:
            compare(args.grad, data, settings, on_step, results.append)
        except KeyboardInterrupt:
            status = 130
    if not results:
        return status
    print(table(results, target=0.9 if args.data == "digits" else None))
    plot = write(results, args.out, f"MDEQ-{args.preset} on {data.name}")
    print(f"results: {args.out / 'results.json'}\nplot: {plot}")
    return status


def _patch(args: argparse.Namespace) -> int:
    from .patching import patch
    from .patching.repository import check_root, outside_links

    if args.recover or args.revert:
        if args.dry_run or args.compat:
            raise ValueError("--dry-run and --compat go with --grad")
        restored = patch.recover(args.repo) if args.recover else patch.revert(args.repo)
        print("\n".join(["restored:", *restored]) if restored else "nothing to restore")
        return 0
    matches, steps, manifest = patch.prepare(args.repo, args.grad, args.compat)
    print("\n".join(f"recognised: {match.project.name}" for match in matches))
    for path in outside_links(check_root(args.repo)):
        print(f"passed over, a link out of the folder: {path}")
    _print_shims(manifest["compat"])
    if not steps:
        print(f"already patched with {args.grad}; nothing to change")
        return 0
    print(patch.diff(steps), end="")
    if args.dry_run:
        print(f"dry run: {len(steps)} files would change")
        return 0
    patch.apply(args.repo, steps, manifest)
    print(f"patched {len(steps)} files; the default is {args.grad}, other methods by")
    for match in matches:
        print(f"  {match.project.name}: {match.project.switch}")
    print(f"back: deq-phantom patch {args.repo} --revert")
    return 0


def _run(args: argparse.Namespace) -> int:
    from .patching import run

    compat = args.compat or []
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise ValueError("no command; expected one after --, such as -- python train.py")
    root = args.repo or run.find_root(Path.cwd())
    matches, changes = run.prepare(root, args.grad, compat)
    for match in matches:
        print(f"deq-phantom: {match.project.name} with {args.grad}", file=sys.stderr)
    _print_shims(compat, sys.stderr)
    return run.run(root, args.grad, changes, command, compat)


def _doctor(args: argparse.Namespace) -> int:
    from .patching.doctor import diagnose

    print(diagnose(args.repo))
    return 0


def _print_shims(names: Sequence[str], file: Any = None) -> None:
    from .patching.compat import SHIMS
    from .patching.repository import check_shims

    check_shims(names)
    for name in names:
        line = (SHIMS[name].__doc__ or "").partition("\n")[0]
        print(f"shim {name}: {line}", file=file or sys.stdout)


if __name__ == "__main__":
    sys.exit(main())
