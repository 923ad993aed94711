"""`deq-phantom report` measures gradient methods on the user's own model, see `model_report`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from .._plumbing.extras import require
from ..diagnostics import model_report
from ..diagnostics.report import DEFAULT_GRADS
from ..hosts import enabled
from ..strategies.registry import get_strategy
from .arguments import positive


def add_to(commands: Any) -> None:
    """Add the command to the commands of a parser."""
    parser = commands.add_parser(
        "report", help="measure gradient methods on your own model and batch, against the exact one"
    )
    parser.set_defaults(run=_report)
    add = parser.add_argument
    add(
        "target",
        metavar="FILE.py:FUNCTION",
        help="a function without arguments that returns (model, inputs, loss), as for "
        "dpp.model_report; package.module:FUNCTION works too",
    )
    add("--grad", nargs="+", default=list(DEFAULT_GRADS), metavar="SPEC")
    add("--repeats", type=positive, default=3, help="timed runs of each method")
    add("--out", type=Path, default=Path("runs/report"), help="folder for results")


def _report(args: argparse.Namespace) -> int:
    for spec in args.grad:
        get_strategy(spec)
    require("matplotlib", "viz")
    with enabled():  # a model's constructors may take names
        model, inputs, loss = build(args.target, "(model, inputs, loss), see dpp.model_report")
        report = model_report(model, inputs, loss, args.grad, repeats=args.repeats)
    print(report)
    report.save_json(args.out / "report.json")
    report.save_html(args.out / "report.html")
    print(f"\nresults: {args.out / 'report.json'}\npage: {args.out / 'report.html'}")
    return 0


def build(target: str, expected: str) -> tuple[Any, Any, Any]:
    """Return the three things that the function builds which FILE.py:FUNCTION names.

    Args:
        target: see `load`.
        expected: the three things, for the message.

    Raises:
        ValueError: if there is no such function, or it returns something else.
    """
    built = load(target)()
    if not isinstance(built, tuple) or len(built) != 3:
        kind = f"a tuple of {len(built)}" if isinstance(built, tuple) else type(built).__name__
        raise ValueError(f"{target} returned {kind}; expected {expected}")
    return built


def load(target: str) -> Callable[[], Any]:
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
        raise ValueError(
            f"{target!r}: {source} has no function {name}; expected one without arguments"
        )
    return function  # type: ignore[no-any-return]


def _run_file(path: Path) -> ModuleType:
    """Run a script, and return it as a module. Its name does not hide another module."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}; expected FILE.py:FUNCTION")
    sys.path.insert(0, str(path.resolve().parent))  # so that the script finds modules beside it
    spec = importlib.util.spec_from_file_location(f"deq_phantom_target_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # pickle and dataclasses look there
    spec.loader.exec_module(module)
    return module
