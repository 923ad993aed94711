"""Measures what `dpp.loop` costs around a recursive model's block.

    OMP_NUM_THREADS=1 python benchmarks/loop.py --repeats 31

The comparison is the same loop written by hand. One step is a loop of 16 evaluations of the block
of a Tiny Recursive Model (width 64), a loss and its backward pass. Only the last evaluation has a
graph. The two loops take turns, and each is first in half of the turns. The script prints the
ratios of their median times. It also prints how many graphs `torch.compile` makes of each loop, and
how many breaks there are.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deq_phantom_plugin as dpp

STEPS = 16
State = tuple[Tensor, Tensor]


class Layer(nn.Module):
    """Mixes tokens, and then channels, each followed by a norm, as TRM does for Sudoku."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Sequential(nn.Linear(length, 2 * length), nn.SiLU())
        self.back = nn.Linear(2 * length, length)
        self.channels = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU())
        self.out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for x; both have the shape (B, L, D)."""
        mixed = self.back(self.tokens(x.transpose(1, 2))).transpose(1, 2)
        x = F.rms_norm(x + mixed, x.shape[-1:])
        return F.rms_norm(x + self.out(self.channels(x)), x.shape[-1:])


class Block(nn.Module):
    """One evaluation of the loop: `cycles` updates of the latents, and one of the answer."""

    def __init__(self, width: int, length: int, cycles: int) -> None:
        super().__init__()
        self.network = nn.Sequential(Layer(width, length), Layer(width, length))
        self.cycles = cycles

    def forward(self, x: Tensor, state: State) -> State:
        """Return the next (answer, latents), each of shape (B, L, D)."""
        answer, latents = state
        for _ in range(self.cycles):
            latents = self.network(answer + latents + x)
        return self.network(answer + latents), latents


def by_hand(block: Block, x: Tensor, state: State) -> Tensor:
    """Return the answer after a loop that is written as in recursive models."""
    with torch.no_grad():
        for _ in range(STEPS - 1):
            state = block(x, state)
    return block(x, state)[0]


STRATEGY = dpp.get_strategy("tbptt(k=1)")


def by_name(block: Block, x: Tensor, state: State) -> Tensor:
    """Return the same answer from `dpp.loop`."""
    return dpp.loop(lambda s: block(x, s), state, STEPS, STRATEGY)[0]


def seconds(forward: Callable[..., Tensor], block: Block, x: Tensor, state: State) -> float:
    """Take a step, and return its time in seconds."""
    block.zero_grad()
    start = time.perf_counter()
    forward(block, x, state).square().mean().backward()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--cycles", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=31)
    args = parser.parse_args()
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, width {args.width}")
    for cycles in args.cycles:
        torch.manual_seed(0)
        block = Block(args.width, args.length, cycles)
        for batch in args.batch:
            x, answer, latents = torch.randn(3, batch, args.length, args.width)
            state = (answer, latents)
            assert torch.equal(by_hand(block, x, state), by_name(block, x, state))
            times: dict[Callable[..., Tensor], list[float]] = {by_hand: [], by_name: []}
            order = [by_hand, by_name]
            for repeat in range(args.repeats + 3):
                for forward in order if repeat % 2 else order[::-1]:
                    taken = seconds(forward, block, x, state)
                    if repeat >= 3:  # the first three turns warm up
                        times[forward].append(taken)
            hand, name = (statistics.median(times[forward]) for forward in order)
            print(f"cycles {cycles}, batch {batch}: {name / hand:.3f} of the loop by hand")
    for forward in order:
        report = torch._dynamo.explain(forward)(block, x, state)
        print(f"{forward.__name__}: {report.graph_count} graphs, {report.graph_break_count} breaks")


if __name__ == "__main__":
    main()
