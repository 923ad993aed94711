"""Trains Transformers' hierarchical recurrent model (hrm_text) on a text with several gradients.

    python examples/train_hrm_text.py                    # Python's own language reference
    python examples/train_hrm_text.py --text FILE --steps 100 --grad own upg "npg(k=3)" ift

"own" is the truncation that the model's code has, by `L_bp_cycles`. The other names are specs of
deq_phantom_plugin. All models begin with the same weights and see the same batches of characters.
The table shows:

- ms/step: the median over steps that the trained models take in turn.
- peak MiB: the memory that such a step needs at most, beyond what was allocated before.
- residual: ||F(z) - z|| / ||F(z)|| of the low-level states after the last cycle. It is the mean
  over sequences and high-level cycles.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.extras import require
from deq_phantom_plugin._plumbing.output import text_table
from deq_phantom_plugin.diagnostics.measure.cost import peak_bytes
from deq_phantom_plugin.hosts import find_equilibria

OWN = "own"
ROUNDS = 5  # timed steps per model


def load(path: Path | None) -> tuple[Tensor, int]:
    """Return a text as the numbers of its characters, and the number of different characters."""
    if path is not None:
        text = path.read_text(encoding="utf-8")
    else:
        from pydoc_data.topics import topics

        text = "\n".join(topics[name] for name in sorted(topics))
    number = {c: i for i, c in enumerate(sorted(set(text)))}
    return torch.tensor([number[c] for c in text]), len(number)


def make(grad: str, characters: int, args: argparse.Namespace) -> Any:
    """Return a model; the weights are the same for every gradient."""
    from transformers import HrmTextConfig, HrmTextForCausalLM

    torch.manual_seed(args.seed)
    config = HrmTextConfig(
        vocab_size=characters,
        hidden_size=args.hidden,
        intermediate_size=2 * args.hidden,
        num_hidden_layers=1,
        num_attention_heads=4,
        head_dim=args.hidden // 4,
        L_cycles=args.cycles,
        max_position_embeddings=args.length,
        grad=None if grad == OWN else grad,
    )
    return HrmTextForCausalLM(config).train()


def batch(data: Tensor, step: int, args: argparse.Namespace) -> Tensor:
    """Return the sequences of a step, shape (batch, length)."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    starts = torch.randint(len(data) - args.length, (args.batch,), generator=generator)
    return data[starts[:, None] + torch.arange(args.length)]


def train_step(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor) -> float:
    """Take a step and return its loss."""
    optimizer.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


def step_seconds(runs: Mapping[str, Sequence[Any]], ids: Tensor) -> dict[str, float]:
    """Return the seconds per step of each model; they take turns, so that conditions are equal."""
    seconds: dict[str, list[float]] = {grad: [] for grad in runs}
    for _ in range(ROUNDS):
        for grad, (model, optimizer, *_) in runs.items():
            begin = time.perf_counter()
            train_step(model, optimizer, ids)
            seconds[grad].append(time.perf_counter() - begin)
    return {grad: statistics.median(times) for grad, times in seconds.items()}


@torch.no_grad()
def validation_loss(model: Any, data: Tensor, args: argparse.Namespace) -> float:
    """Return the mean loss on 16 batches from the last tenth of the text."""
    model.eval()
    losses = []
    for i in range(16):
        ids = batch(data, -1 - i, args)
        losses.append(float(model(ids, labels=ids, use_cache=False).loss))
    model.train()
    return statistics.fmean(losses)


def residual(model: Any, ids: Tensor) -> float:
    """Return the mean relative residual of the low-level states."""
    found: list[Tensor] = []
    ((host, module),) = find_equilibria(model)
    end = host.observe(module, lambda solve: found.append(solve.residual))
    model(ids)
    end()
    return float(torch.cat(found).mean())


def main(argv: Sequence[str] | None = None) -> str:
    """Train one model per gradient, and return the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--text", type=Path, help="a text file (Python's language reference)")
    add("--grad", nargs="+", default=[OWN, "upg", "npg", "ift"], metavar="SPEC")
    add("--steps", type=int, default=100, help="optimiser steps (100)")
    add("--batch", type=int, default=8, help="sequences per step (8)")
    add("--length", type=int, default=64, help="characters per sequence (64)")
    add("--hidden", type=int, default=64, help="size of a state (64)")
    add("--cycles", type=int, default=3, help="L_cycles, low-level cycles (3)")
    add("--lr", type=float, default=3e-3, help="AdamW's learning rate (3e-3)")
    add("--seed", type=int, default=0, help="of weights and batches (0)")
    args = parser.parse_args(argv)
    require("transformers", "text")
    for grad in args.grad:
        if grad != OWN:
            try:
                dpp.get_strategy(grad)
            except ValueError as error:
                parser.error(f"{error}; or {OWN!r}")
    dpp.enable("hrm_text")
    data, characters = load(args.text)
    cut = len(data) * 9 // 10
    if len(data) - cut <= args.length:
        parser.error(
            f"the text has {len(data)} characters; expected at least {10 * args.length + 10}, so "
            "that the last tenth has a whole sequence"
        )
    runs = {}
    for grad in args.grad:
        model = make(grad, characters, args)
        optimizer = torch.optim.AdamW(model.parameters(), args.lr)
        losses = [
            train_step(model, optimizer, batch(data[:cut], step, args))
            for step in range(args.steps)
        ]
        runs[grad] = (model, optimizer, losses, validation_loss(model, data[cut:], args))
    ids = batch(data[:cut], args.steps, args)
    seconds = step_seconds(runs, ids)
    rows = []
    for grad, (model, optimizer, losses, validation) in runs.items():
        peak = peak_bytes(lambda m=model, o=optimizer: train_step(m, o, ids), torch.device("cpu"))
        rows.append(
            [
                grad,
                f"{statistics.fmean(losses[-10:]):.3f}",
                f"{validation:.3f}",
                f"{1e3 * seconds[grad]:.1f}",
                f"{peak / 2**20:.1f}",
                f"{residual(model, ids):.1e}",
            ]
        )
    header = ["gradient", "training loss", "validation loss", "ms/step", "peak MiB", "residual"]
    table = text_table(header, rows)
    print(table)
    return table


if __name__ == "__main__":
    main()
