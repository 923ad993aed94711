"""Counts what processes exchange in a training step, for each strategy.

    python benchmarks/collectives.py [--processes 2] [--width 64] [--fsdp] [--grad "npg" "auto"]

The script trains a small model on the CPU in DistributedDataParallel, or with FSDP2 (`--fsdp`). It
counts every collective that PyTorch's dispatcher sees, with those of DDP's reducer and of `auto`.
The counted step is the fourth one; `auto(every=1)` measures in it, and `auto(every=100)` does not.
Bytes are those of all tensors among the arguments of a collective, outputs included.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.output import text_table

SPECS = (
    "jfb",
    "npg",
    "npg_rr",
    "upg",
    "upg(k=3, checkpoint=True)",
    "upg(lam='adaptive')",
    "ift",
    "ift(tol=0.01, warm_start=True)",
    "shine",
    "exact",
    "reversible(steps=5)",
    "bptt(steps=5)",
    "tbptt(k=3)",
    "guard('ift', on_failure=\"fallback('jfb')\")",
    "schedule({0: 'bptt(steps=5)', 1: 'npg'})",
    "auto(every=100)",
    "auto(every=1)",
    "auto(every=1, methods=['jfb', 'npg', 'ift'])",
)
_NAMESPACES = ("c10d", "_c10d_functional")
_NO_TRAFFIC = ("wait_tensor", "monitored_barrier_")


class Count(TorchDispatchMode):
    """Counts collectives, and the bytes of the tensors that are passed to them.

    Attributes:
        calls: the number of calls of each collective.
        bytes: the bytes of all tensors among the arguments.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace in _NAMESPACES:
            name = func.overloadpacket.__name__.strip("_")
            if func.overloadpacket.__name__ not in _NO_TRAFFIC:
                self.calls[name] += 1
                tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
                self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return func(*args, **(kwargs or {}))


class Net(nn.Module):
    """An equilibrium between two linear layers."""

    def __init__(self, grad: str, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inject, self.inner = nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        nn.init.orthogonal_(self.inner.weight, 0.8)
        solver = "broyden" if grad.startswith("shine") else "fixed_point"
        options: dict[str, Any] = {"solver": solver}
        if grad.startswith("tbptt"):
            options = {"steps": 10}
        self.equilibrium = dpp.Equilibrium(grad=grad, batch_dim=0, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for x, shape (B, width)."""
        u = self.inject(x)
        h = self.equilibrium(lambda h: torch.tanh(self.inner(h) + u), torch.zeros_like(u))
        output: Tensor = self.out(h)
        return output


def counted(spec: str, width: int, fsdp: bool) -> list[str]:
    """Return a row of the table, for the fourth step: DDP has arranged its buckets by then."""
    model = Net(spec, width)
    wrapped: nn.Module = model
    if fsdp:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    else:
        wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for step in range(4):
        dpp.set_step(model, step)
        x = torch.randn(4, width, generator=generator)
        optimizer.zero_grad()
        with Count() as count:
            wrapped(x).square().mean().backward()
            optimizer.step()
    names = ", ".join(f"{number} {name}" for name, number in sorted(count.calls.items()))
    return [spec, names, str(sum(count.calls.values())), str(count.bytes)]


def process(
    rank: int, processes: int, folder: str, specs: Sequence[str], width: int, fsdp: bool
) -> None:
    """Run one of the processes; the first one prints the table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=processes,
        timeout=datetime.timedelta(minutes=2),
    )
    rows = [counted(spec, width, fsdp) for spec in specs]
    if rank == 0:
        size = sum(p.numel() * p.element_size() for p in Net("jfb", width).parameters())
        print(f"{processes} processes, {size} bytes of parameters")
        print(text_table(["strategy", "collectives of a step", "calls", "bytes"], rows))
    # DDP is in a reference cycle. If it still exists at exit, it sometimes aborts the process.
    gc.collect()
    dist.destroy_process_group()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--fsdp", action="store_true", help="FSDP2 in place of DDP")
    parser.add_argument("--grad", nargs="+", default=SPECS, help="specs; by default all kinds")
    args = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            process,
            (args.processes, folder, args.grad, args.width, args.fsdp),
            args.processes,
            start_method="fork" if hasattr(os, "fork") else "spawn",
        )


if __name__ == "__main__":
    main()
