"""What `train_lm.py` and `train_looped_lm.py` share.

These are the arguments of a training, texts as characters, a training step with its learning rate,
the measurement of times and memory, checkpoints, and files of results.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.extras import require
from deq_phantom_plugin._plumbing.output import write_whole
from deq_phantom_plugin.diagnostics.measure.cost import now, peak_bytes

POINTS, ROUNDS = 8, 5  # points of training at which steps are timed, and times at each point

# --- the command line ----------------------------------------------------------------------------


def add_arguments(
    parser: argparse.ArgumentParser, *, name: str, steps: int, lr: float, eval_every: int
) -> None:
    """Add the arguments of a training: its data, sizes, steps and files.

    Args:
        parser: gets the arguments.
        name: of the files with results.
        steps: the default of `--steps`.
        lr: that of `--lr`.
        eval_every: that of `--eval-every`.
    """
    add = parser.add_argument
    add("--text", type=Path, help="a text file (Python's language reference)")
    add("--steps", type=int, default=steps, help=f"optimiser steps ({steps})")
    add("--batch", type=int, default=16, help="sequences per step (16)")
    add("--length", type=int, default=64, help="characters per sequence (64)")
    add("--lr", type=float, default=lr, help=f"AdamW's highest learning rate ({lr:g})")
    add("--hidden", type=int, default=64, help="size of a state (64)")
    add("--heads", type=int, default=4, help="attention heads (4)")
    every = f"steps between evaluations, checkpoints ({eval_every})"
    add("--eval-every", type=int, default=eval_every, help=every)
    add("--eval-sequences", type=int, default=256, help="validation sequences, at most (256)")
    add("--device", default="cpu", help="where to train (cpu)")
    add("--resume", action="store_true", help="go on from checkpoints in the folder of results")
    add("--name", help=f"of the files with results ({name}, and the text's name)")
    add("--out", type=Path, default=Path("runs", name), help=f"folder for results (runs/{name})")


def parsed(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, name: str
) -> argparse.Namespace:
    """Return the arguments, of which those of `add_arguments` are checked and `name` is filled in.

    Raises:
        SystemExit: if one is out of range; the message says which are accepted.
    """
    args = parser.parse_args(argv)
    if min(args.steps, args.batch, args.eval_every, args.eval_sequences) < 1 or args.length < 2:
        parser.error("expected steps, batch, eval-every and eval-sequences above 0, length above 1")
    args.name = args.name or (name if args.text is None else f"{name}_{slug(args.text.stem)}")
    return args


@contextmanager
def progress_bar(total: int) -> Iterator[tuple[Any, Callable[[int, str], None]]]:
    """Show a bar of so many steps, if standard error is a terminal.

    Yields:
        The bar, and a function that adds a number of steps of a method to it.

    Raises:
        ImportError: if tqdm is not installed; the message has the pip command.
    """
    tqdm = require("tqdm", "experiments").tqdm
    with tqdm(total=total, unit=" steps", mininterval=1, disable=None) as bar:

        def progress(n: int, method: str) -> None:
            bar.set_description(method, refresh=False)
            bar.update(n)

        yield bar, progress


# --- data -----------------------------------------------------------------------------------------


def load_text(path: Path | None) -> str:
    """Return a text file, or the language reference that Python ships with."""
    if path is not None:
        return path.read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def encode(text: str) -> tuple[Tensor, list[str]]:
    """Return a text as indices into its sorted characters, int64, and these characters."""
    characters = sorted(set(text))
    number = {character: i for i, character in enumerate(characters)}
    return torch.tensor([number[character] for character in text]), characters


def split(path: Path | None, length: int) -> tuple[Tensor, Tensor, list[str]]:
    """Return a text in two parts, and its characters.

    Args:
        path: the text file, None for Python's language reference.
        length: the number of characters per sequence.

    Returns:
        The first nine tenths for training, the last tenth for validation, and the characters.

    Raises:
        SystemExit: if the last tenth is too short for one sequence.
    """
    data, characters = encode(load_text(path))
    cut = len(data) * 9 // 10
    if len(data) - cut < length + 1:
        raise SystemExit(
            f"the text has {len(data)} characters; expected at least {10 * (length + 1)} for "
            f"sequences of {length}"
        )
    return data[:cut], data[cut:], characters


def batch_at(data: Tensor, step: int, args: argparse.Namespace) -> Tensor:
    """Return the batch of a step, shape (batch, length); it does not depend on earlier steps."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    starts = torch.randint(len(data) - args.length, (args.batch,), generator=generator)
    return data[starts[:, None] + torch.arange(args.length)]


# --- training -------------------------------------------------------------------------------------


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Return the rate of a step: it rises over a twentieth of all steps, then follows a cosine."""
    warmup = max(1, args.steps // 20)
    if step < warmup:
        return float(args.lr * (step + 1) / warmup)
    return float(args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (args.steps - warmup))))


def train_step(model: Any, optimizer: Any, ids: Tensor, step: int, args: argparse.Namespace) -> Any:
    """Take one optimiser step and return the output of the model.

    The random numbers depend only on the step and on the seed.

    Raises:
        FloatingPointError: if the loss is not finite.
    """
    torch.manual_seed(args.seed * 1_000_003 + step)  # for dropout and the regulariser's probes
    dpp.set_step(model, step, total=args.steps)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, args)
    output = model(ids, labels=ids)
    optimizer.zero_grad()
    output.loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if not torch.isfinite(norm + output.loss.detach()):
        raise FloatingPointError(f"loss {output.loss.item()}, gradient norm {norm.item()}")
    optimizer.step()
    return output


def step_costs(
    models: Mapping[str, tuple[Any, Any]], data: Tensor, args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Return the seconds of a training step of each model, and the most bytes that one allocates.

    The models take the same steps in turn, so that conditions are equal for all. The steps are
    spread over training, since a loop may draw its depth or grow. At each point the median of
    several times is taken, and the result is the mean over the points.

    Args:
        models: name -> (model, optimizer). The models are trained on by this function.
        data: the training text.
        args: the arguments of the command.
    """
    device = torch.device(args.device)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    peaks = dict.fromkeys(models, 0)
    for step in sorted({point * args.steps // POINTS for point in range(POINTS)}):
        ids = batch_at(data, step, args).to(device)
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(ROUNDS):
            for name, (model, optimizer) in models.items():
                begin = now(device)
                train_step(model, optimizer, ids, step, args)
                times[name].append(now(device) - begin)
        for name, (model, optimizer) in models.items():
            seconds[name].append(statistics.median(times[name]))
            once_more = partial(train_step, model, optimizer, ids, step, args)
            peaks[name] = max(peaks[name], peak_bytes(once_more, device))
    return {n: {"seconds": statistics.fmean(seconds[n]), "bytes": peaks[n]} for n in models}


# --- what is kept ---------------------------------------------------------------------------------


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments on which the results of a run depend."""
    others = ("out", "name", "resume", "methods", "seeds", "text", "device", "prompt", "report")
    return {key: value for key, value in vars(args).items() if key not in others}


def save_checkpoint(
    path: Path, run: Any, model: Any, optimizer: Any, args: argparse.Namespace
) -> None:
    """Save all that a run is resumed from; `run` is a dataclass with its results so far."""
    buffer = io.BytesIO()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    state["memory"] = dpp.memory_state_dict(model)
    torch.save({"run": asdict(run), "settings": settings(args), **state}, buffer)
    write_whole(path, buffer.getvalue())


def restore(path: Path, run: Any, model: Any, optimizer: Any, args: argparse.Namespace) -> None:
    """Load a checkpoint into a run, its model and its optimiser.

    Raises:
        SystemExit: if the checkpoint has other settings; the message names them.
    """
    found = torch.load(path, map_location=args.device, weights_only=True)
    now, then = settings(args), found["settings"]
    changed = [f"{key} was {then.get(key)!r}" for key in now if now[key] != then.get(key)]
    if changed:
        raise SystemExit(f"{path} cannot be resumed: {', '.join(changed)}; drop --resume")
    model.load_state_dict(found["model"])
    dpp.load_memory_state_dict(model, found.get("memory", {}))
    optimizer.load_state_dict(found["optimizer"])
    vars(run).update(found["run"])


def slug(method: str) -> str:
    """Return a method in the form of a file name."""
    return re.sub(r"[^A-Za-z0-9.+=-]+", "_", method).strip("_")


def finite(content: Any) -> Any:
    """Return content with None in place of NaN and infinity, which JSON does not have."""
    return json.loads(json.dumps(content), parse_constant=lambda _: None)


def as_csv(rows: Iterable[Sequence[Any]]) -> bytes:
    """Return rows as a file of comma-separated values."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def blank_figure(width: float, height: float) -> Any:
    """Return a figure without a window; width and height are in inches.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    require("matplotlib", "viz")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def as_png(figure: Any) -> bytes:
    """Return a figure as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
