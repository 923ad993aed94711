"""What the language models here share: characters of a text, a training step, checkpoints."""

from __future__ import annotations

import argparse
import io
import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.output import write_whole

# --- data -----------------------------------------------------------------------------------------


def load_text(path: Path | None) -> str:
    """Return a text file, or the language reference that Python ships with."""
    if path is not None:
        return path.read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def encode(text: str) -> tuple[Tensor, list[str]]:
    """Return a text as indices into its sorted characters, and these."""
    characters = sorted(set(text))
    number = {character: i for i, character in enumerate(characters)}
    return torch.tensor([number[character] for character in text]), characters


def split(path: Path | None, length: int) -> tuple[Tensor, Tensor, list[str]]:
    """Return the first nine tenths of a text and the last, to validate on, and its characters.

    Raises:
        SystemExit: if that is too short for sequences of so many characters.
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
    """Return the batch of a step, shape (batch, length), whichever steps came before."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    starts = torch.randint(len(data) - args.length, (args.batch,), generator=generator)
    return data[starts[:, None] + torch.arange(args.length)]


# --- training -------------------------------------------------------------------------------------


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Return the rate of a step: a linear rise over a twentieth of all, then half a cosine."""
    warmup = max(1, args.steps // 20)
    if step < warmup:
        return float(args.lr * (step + 1) / warmup)
    return float(args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (args.steps - warmup))))


def train_step(model: Any, optimizer: Any, ids: Tensor, step: int, args: argparse.Namespace) -> Any:
    """Take one optimiser step and return the model's output; its numbers come from the step alone.

    Raises:
        FloatingPointError: if the loss is not finite.
    """
    torch.manual_seed(args.seed * 1_000_003 + step)  # dropout, probes of the regulariser
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


# --- what is kept ---------------------------------------------------------------------------------


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return what a run depends on."""
    others = ("out", "name", "resume", "methods", "seeds", "text", "device", "prompt")
    return {key: value for key, value in vars(args).items() if key not in others}


def save_checkpoint(
    path: Path, run: Any, model: Any, optimizer: Any, args: argparse.Namespace
) -> None:
    """Write all that a run, a dataclass with a method and its steps, goes on from."""
    buffer = io.BytesIO()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    state["memory"] = dpp.memory_state_dict(model)
    torch.save({"run": asdict(run), "settings": settings(args), **state}, buffer)
    write_whole(path, buffer.getvalue())


def restore(path: Path, run: Any, model: Any, optimizer: Any, args: argparse.Namespace) -> None:
    """Take up a run.

    Raises:
        SystemExit: if it had other settings.
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
    """Return a method as a file name."""
    return re.sub(r"[^A-Za-z0-9.+=-]+", "_", method).strip("_")


def finite(content: Any) -> Any:
    """Return content for JSON, which has neither NaN nor infinity."""
    return json.loads(json.dumps(content), parse_constant=lambda _: None)
