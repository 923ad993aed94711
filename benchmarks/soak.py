"""A long training in several processes, and whether anything in it grows.

    torchrun --standalone --nproc-per-node 2 benchmarks/soak.py [--steps 20000] [--out runs/soak]

A small model with two equilibria: one follows a schedule into `auto`, one has `guard` around a
warm-started `ift`. Training is watched by `dpp.monitor`, averaged, and saved 40 times. Prints what
each process holds, and at the end a verdict on each number, by a rule that does not depend on the
machine; the last three quarters of the run count, when caches have filled. Ends with 1 if anything
grew.

Resident memory may grow by 100 bytes a step, a fifth of what one tensor that is kept in each step
takes, and by two megabytes, as allocators take them. Of tensors, file handles and threads the
fewest in the last quarter may not be more than the fewest in the second, of tensors not by more
than 32, for a solve leaves more behind for the next step or less. The up to 16 workspaces that
solvers keep for the next solve, whose number goes up and down, are not counted. The
processor's time of a step may grow by a quarter: it is that, and not the clock's, which others'
work on the machine changes, and the model learns so slowly that its solves stay as long. Growth of
memory and time is that of the Theil-Sen line, the median of the slopes between all pairs of
samples, which single outliers do not move.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.output import text_table
from deq_phantom_plugin._plumbing.workspaces import Workspaces

sys.path.append(str(Path(__file__).parents[1] / "examples"))

from train_ddp import Checkpoints

SAMPLES = 40
WIDTH, ROWS = 16, 8
PAGE = os.sysconf("SC_PAGE_SIZE")
SCHEDULE = "schedule({0: 'bptt(steps=10)', 0.1: 'auto(cosine=0.9, every=50)'})"
GUARDED = "guard('ift(tol=0.01, warm_start=True)')"


@dataclass(frozen=True)
class Sample:
    """What a process holds after some step.

    Attributes:
        step: how many steps were trained.
        memory: resident, in bytes.
        tensors: that the garbage collector knows.
        handles: open files.
        threads: of the process, those of PyTorch included.
        milliseconds: of the processor's time, the median of the steps since the sample before.
    """

    step: int
    memory: int
    tensors: int
    handles: int
    threads: int
    milliseconds: float

    @classmethod
    def take(cls, step: int, seconds: Sequence[float]) -> Sample:
        """Return what this process holds.

        Args:
            step: how many steps were trained.
            seconds: those that the steps since the last sample took.
        """
        for kept in gc.get_objects():
            if type(kept) is Workspaces:
                kept._waiting.clear()
        gc.collect()
        tensors = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
        handles, threads = (len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task"))
        return cls(step, resident, tensors, handles, threads, 1e3 * statistics.median(seconds))


@dataclass(frozen=True)
class Verdict:
    """Whether a number was flat.

    Attributes:
        name: of the number.
        grown: by how much, over the last three quarters.
        allowed: how much that may be.
    """

    name: str
    grown: float
    allowed: float

    @property
    def flat(self) -> bool:
        """Whether it did not grow by more than that."""
        return self.grown <= self.allowed


def verdicts(samples: Sequence[Sample]) -> list[Verdict]:
    """Judge the samples of a process, at least 8, by the rule that stands at the top."""
    quarter = len(samples) // 4
    counted = samples[quarter:]
    steps = [sample.step for sample in counted]
    span = steps[-1] - steps[0]
    found = []
    for name in (field.name for field in fields(Sample) if field.name != "step"):
        values = [getattr(sample, name) for sample in counted]
        if name in ("memory", "milliseconds"):
            grown = span * slope(steps, values)
            allowed = 2**21 + 100 * span if name == "memory" else statistics.median(values) / 4
        else:
            grown = min(values[-quarter:]) - min(values[:quarter])
            allowed = 32 if name == "tensors" else 0
        found.append(Verdict(name, grown, allowed))
    return found


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the median of the slopes between all pairs."""
    pairs = itertools.combinations(zip(x, y, strict=True), 2)
    return statistics.median((d - b) / (c - a) for (a, b), (c, d) in pairs)


class Net(nn.Module):
    """Two equilibria between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inject, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.inner = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        for layer in self.inner:
            nn.init.orthogonal_(layer.weight, 0.6)
        self.first = dpp.Equilibrium("anderson", SCHEDULE, batch_dim=0)
        self.second = dpp.Equilibrium("fixed_point", GUARDED, batch_dim=0)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for x, shape (B, WIDTH)."""
        h = self.inject(x)
        for layer, equilibrium in zip(self.inner, (self.first, self.second), strict=True):
            h = equilibrium(_cell(layer, h), torch.zeros_like(h))
        output: Tensor = self.out(h)
        return output


def _cell(layer: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda h: torch.tanh(layer(h) + x)


def train(model: Net, steps: int, out: Path, log: TextIO) -> Iterator[Sample]:
    """Train, and yield samples."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-5)
    checkpoints = Checkpoints(out / "checkpoints")
    generator = torch.Generator().manual_seed(dist.get_rank())
    every, seconds = max(1, steps // SAMPLES), []
    with dpp.monitor(model, lambda numbers, step: log.write(f"{step} {numbers}\n"), every=100):
        for step in range(1, steps + 1):
            begun = time.process_time()
            x = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
            dpp.set_step(parallel, step - 1, total=steps)
            optimizer.zero_grad()
            (parallel(x) - x.roll(1, dims=1)).square().mean().backward()
            optimizer.step()
            average.update_parameters(model)
            seconds.append(time.process_time() - begun)
            if step % every == 0:
                named = {"model": model, "average": average, "optimizer": optimizer}
                shared = {name: part.state_dict() for name, part in named.items()}
                checkpoints.save(step, shared, {"memory": dpp.memory_state_dict(model)})
                yield Sample.take(step, seconds)
                seconds.clear()


def main() -> None:
    """Train, print what there is, and end with 1 if anything grew."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # `auto` may say that nothing is good enough
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=5))
    rank = dist.get_rank()
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    model, samples, begun = Net(), [], time.perf_counter()
    with open(args.out / f"monitor_{rank}.txt", "w") as log:
        for sample in train(model, args.steps, args.out, log):
            samples.append(sample)
            if rank == 0:
                print(_line(sample, time.perf_counter() - begun), flush=True)
    found: list[list[Verdict]] = [[]] * dist.get_world_size()
    dist.all_gather_object(found, verdicts(samples))
    if rank == 0:
        print(dpp.report_choice(model))
        rows = [
            [str(i), v.name, f"{v.grown:.4g}", f"{v.allowed:.4g}", "flat" if v.flat else "GROWS"]
            for i, of_process in enumerate(found)
            for v in of_process
        ]
        print(text_table(["process", "number", "grown", "allowed", ""], rows), flush=True)
    gc.collect()  # DDP is in a circle; what is left of it at exit aborts the process now and then
    dist.destroy_process_group()
    sys.exit(not all(v.flat for of_process in found for v in of_process))


def _line(sample: Sample, seconds: float) -> str:
    return (
        f"step {sample.step}: {sample.memory / 2**20:.1f} MiB, {sample.tensors} tensors, "
        f"{sample.handles} handles, {sample.threads} threads, "
        f"{sample.milliseconds:.2f} ms a step; {seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
