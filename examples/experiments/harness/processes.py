"""Training in several processes that torchrun has started.

With one process, all functions of this file do nothing, or return their input.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

_alone = False


def start(device: str) -> torch.device:
    """Join the processes of torchrun, if there are any, and return the device of this process.

    Args:
        device: "cpu", "cuda", ...; "auto" for a GPU if there is one.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if "RANK" not in os.environ:
        return torch.device(device)
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    # A process that has finished its runs waits for the others, however long they take.
    dist.init_process_group(timeout=datetime.timedelta(days=30))
    return torch.device(device)


def stop() -> None:
    """Leave the group of processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def alone() -> Iterator[None]:
    """Let every process work by itself inside a `with` block, as if it were the only one."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def are_joint() -> bool:
    """Return whether several processes work together."""
    return dist.is_initialized() and not _alone


def rank() -> int:
    """Return the number of this process, counted from 0."""
    return dist.get_rank() if are_joint() else 0


def count() -> int:
    """Return the number of processes that work together."""
    return dist.get_world_size() if are_joint() else 1


def share(samples: Tensor) -> Tensor:
    """Return the part of a joint batch that belongs to this process: every n-th of its samples.

    Raises:
        ValueError: if the parts would differ in size. The average over processes would then not be
            the gradient of the batch.
    """
    if len(samples) % count():
        raise ValueError(
            f"a batch of {len(samples)} for {count()} processes; expected a multiple of the number "
            "of processes, so that their parts are equal"
        )
    return samples[rank() :: count()]


def seed(run: int, step: int) -> int:
    """Return a seed that differs for each run, step and process."""
    return (run * 1_000_003 + step) * count() + rank()


def epoch_order(run: int, epoch: int, samples: int) -> Tensor:
    """Return the order of the samples in an epoch, which is the same in all processes.

    Args:
        run: the seed of the run.
        epoch: the epoch.
        samples: the number of samples.
    """
    generator = torch.Generator().manual_seed(run * 1_000_003 + epoch)
    return torch.randperm(samples, generator=generator)


def total(numbers: Tensor) -> Tensor:
    """Add up a tensor over all processes, in place, and return it."""
    if are_joint():
        dist.all_reduce(numbers)
    return numbers


def any_of(flag: bool, device: torch.device) -> bool:
    """Return whether the flag is set in any process."""
    return bool(total(torch.tensor(float(flag), device=device)) > 0)


def wait() -> None:
    """Wait until all processes are here."""
    if are_joint():
        dist.barrier()


def agree(model: nn.Module) -> None:
    """Copy the buffers of the first process to all others.

    Running means differ between processes, since each has seen its own samples.
    """
    if are_joint():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def parallel(model: nn.Module) -> Any:
    """Return a module whose gradients are averaged over all processes."""
    return nn.parallel.DistributedDataParallel(model) if are_joint() else model
