"""Measures what lockstep costs in a training step with a fixed number of evaluations.

    torchrun --standalone --nproc-per-node 2 benchmarks/lockstep.py [--width 64 256 512]

F is the feed-forward block of a transformer. FSDP2 shards it apart from its model, with the backend
gloo. Steps with and without lockstep take 20 evaluations and 10 products each, so no process waits
for another one that has more to do. They are taken in turn, in pairs. For each width the script
prints the time of an evaluation, and the median time of a step without lockstep. It also prints the
median over the pairs of the time with lockstep, divided by the time without.
"""

from __future__ import annotations

import argparse
import statistics
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.output import text_table
from deq_phantom_plugin.diagnostics.measure.cost import now

EVALUATIONS, PRODUCTS, ROWS = 20, 10, 256


class Model(nn.Module):
    """An equilibrium between two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inject, self.out = nn.Linear(16, width), nn.Linear(width, 1)
        self.block = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.equilibrium = dpp.Equilibrium(
            "anderson",
            f"ift(tol=1e-30, max_iter={PRODUCTS}, solver='anderson')",
            max_iter=EVALUATIONS,
            tol=0.0,
            batch_dim=0,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return one number per row of x, shape (B, 1)."""
        u = self.inject(x)
        h: Tensor = self.equilibrium(lambda h: 0.3 * self.block(h) + u, torch.zeros_like(u))
        return self.out(h)


def step(model: Model, x: Tensor, group: object) -> float:
    """Return the seconds of a training step; `group` is None without lockstep, else "auto"."""
    model.equilibrium.process_group = group
    model.zero_grad()
    dist.barrier()
    start = now(x.device)
    model(x).square().mean().backward()
    return now(x.device) - start


def measure(width: int, repeats: int) -> list[str]:
    """Return a row of the table."""
    model = Model(width)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    x = torch.randn(ROWS, 16)
    pairs = []
    for index in range(repeats + 1):
        groups = (None, "auto") if index % 2 else ("auto", None)
        seconds = {group: step(model, x, group) for group in groups}
        if index:  # the first pair warms up
            pairs.append((seconds[None], seconds["auto"]))
    without = statistics.median(plain for plain, _ in pairs)
    ratio = statistics.median(lockstep / plain for plain, lockstep in pairs)
    # A product counts as two evaluations, and so does the last backward pass.
    evaluation = without / (EVALUATIONS + 1 + 2 * (PRODUCTS + 1))
    return [str(width), f"{1e3 * evaluation:.1f}", f"{1e3 * without:.0f}", f"{ratio:.3f}"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, nargs="+", default=[64, 256, 512])
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the solves stop short
    dist.init_process_group("gloo")
    rows = [measure(width, args.repeats) for width in args.width]
    if dist.get_rank() == 0:
        print(text_table(["width", "evaluation ms", "step ms", "with / without"], rows))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
