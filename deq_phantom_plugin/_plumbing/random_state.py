"""Reads, compares and restores the random state of PyTorch's default generators."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def random_state(leaves: Iterable[Tensor]) -> list[Tensor]:
    """Return the random state of the CPU, then that of each of the leaves' other devices."""
    others = [module.get_rng_state(*of) for module, of in _generators(leaves)]
    return [torch.get_rng_state(), *others]


def is_same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether two random states are equal, so that nothing was drawn between them."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@contextmanager
def forked_rng(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Restore the random state of the CPU and of the leaves' devices after a `with` block."""
    leaves = list(leaves)
    before = random_state(leaves)
    try:
        yield
    finally:
        set_random_state(leaves, before)


def set_random_state(leaves: Iterable[Tensor], states: Sequence[Tensor]) -> None:
    """Set the random state to what `random_state` returned for the same leaves."""
    torch.set_rng_state(states[0])
    for (module, of), state in zip(_generators(leaves), states[1:], strict=True):
        module.set_rng_state(state, *of)


def _generators(leaves: Iterable[Tensor]) -> Iterator[tuple[Any, tuple[torch.device, ...]]]:
    """Yield, for each of the leaves' devices but the CPU, PyTorch's module and its arguments."""
    for device in sorted({leaf.device for leaf in leaves}, key=str):
        if device.type not in ("cpu", "meta"):
            # Apple's devices ("mps") share one generator, and their functions take no device.
            yield torch.get_device_module(device), () if device.type == "mps" else (device,)
