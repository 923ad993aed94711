"""Trains for a long time in several processes, and checks that nothing grows.

    torchrun --standalone --nproc-per-node 2 benchmarks/soak.py [--steps 20000] [--out runs/soak]

The model is small and has two equilibria. The first follows a schedule that ends in `auto`. The
second has `guard` around a warm-started `ift`. `dpp.monitor` watches the training. The weights are
averaged, and 40 checkpoints are saved. With each checkpoint, the script prints what the first
process holds. At the end it prints a verdict on each number. It exits with 1 if a number has grown.

The rule for the verdicts does not depend on the machine. Only the last three quarters of the run
count, since caches fill in the first quarter.

- Resident memory may grow by 100 bytes per step, plus two megabytes that an allocator may take. One
  tensor that is kept in each step would take five times as much.
- Tensors, file handles and threads: the smallest number in the last quarter may not exceed the
  smallest number in the second quarter. For tensors it may exceed it by 32, since solves leave more
  or fewer tensors for the next step. Solvers keep up to 16 workspaces for the next solve. Their
  number varies, so they do not count.
- The processor time of a step may grow by a quarter. Wall-clock time is not used, since other work
  on the machine changes it. The model learns so slowly that its solves do not get longer.

The growth of memory and of time is that of the Theil-Sen line, whose slope is the median of the
slopes between all pairs of samples. Single outliers do not change it.
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

SAMPLES = 40  # samples and checkpoints in a run
WIDTH, ROWS = 16, 8
PAGE = os.sysconf("SC_PAGE_SIZE")
SCHEDULE = "schedule({0: 'bptt(steps=10)', 0.1: 'auto(cosine=0.9, every=50)'})"
GUARDED = "guard('ift(tol=0.01, warm_start=True)')"


@dataclass(frozen=True)
class Sample:
    """What a process holds after a step.

    Attributes:
        step: the number of trained steps.
        memory: the resident memory in bytes.
        tensors: the number of tensors that the garbage collector knows.
        handles: the number of open files.
        threads: the number of threads of the process, with those of PyTorch.
        milliseconds: the processor time per step, as the median since the last sample.
    """

    step: int
    memory: int
    tensors: int
    handles: int
    threads: int
    milliseconds: float

    @classmethod
    def take(cls, step: int, seconds: Sequence[float]) -> Sample:
        """Return a sample of this process.

        Args:
            step: the number of trained steps.
            seconds: the processor time of each step since the last sample.
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
    """Whether a number has grown.

    Attributes:
        name: the name of the number.
        grown: its growth over the last three quarters of the run.
        allowed: the largest growth that is allowed.
    """

    name: str
    grown: float
    allowed: float

    @property
    def flat(self) -> bool:
        """Whether the growth is allowed."""
        return self.grown <= self.allowed


def verdicts(samples: Sequence[Sample]) -> list[Verdict]:
    """Return the verdicts on the samples of a process, by the rule in the docstring above.

    Args:
        samples: at least 8 samples.
    """
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
    """Return the median of the slopes between all pairs of points (x, y)."""
    pairs = itertools.combinations(zip(x, y, strict=True), 2)
    return statistics.median((d - b) / (c - a) for (a, b), (c, d) in pairs)


class Net(nn.Module):
    """Two equilibria, one after the other, between linear layers."""

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
    """Train the model, save checkpoints, and yield a sample after each."""
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
    """Train, print samples and verdicts, and exit with 1 if a number has grown."""
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
    # DDP is in a reference cycle. If it still exists at exit, it sometimes aborts the process.
    gc.collect()
    dist.destroy_process_group()
    sys.exit(not all(v.flat for of_process in found for v in of_process))


def _line(sample: Sample, seconds: float) -> str:
    return (
        f"step {sample.step}: {sample.memory / 2**20:.1f} MiB, {sample.tensors} tensors, "
        f"{sample.handles} handles, {sample.threads} threads, "
        f"{sample.milliseconds:.2f} ms per step; {seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
