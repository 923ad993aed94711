"""Solvers work in the dtype of their matrices; only F sees the caller's autocast."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .trees import State, flatten, unflatten

R = TypeVar("R")


def autocasts(kind: str) -> bool:
    """Whether the caller is under autocast of a kind of device."""
    # The meta device has none, and says so by an error.
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Switch autocast off, which would take inner products in 16 bits."""
    if not autocasts(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


class AutocastState:
    """Autocast as it is now, for evaluations of F later.

    Args:
        leaves: of a state; the settings of their devices are kept, and the CPU's.
    """

    def __init__(self, leaves: Iterable[Tensor]) -> None:
        self._settings = [
            (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
            for device in sorted({"cpu", *(leaf.device.type for leaf in leaves)})
            if torch.amp.is_autocast_available(device)
        ]

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Go back to it inside a `with` block."""
        with contextlib.ExitStack() as stack:
            for device, dtype, enabled in self._settings:
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
            yield


def under_autocast(
    func: Callable[[State], State], like: Sequence[Tensor], dtype: torch.dtype
) -> Callable[[State], State]:
    """Return F under autocast, with what it returns cast back to the dtypes of a state.

    Args:
        func: F.
        like: the leaves of a state.
        dtype: what autocast casts to.
    """
    kind, own = like[0].device.type, [leaf.dtype for leaf in like]

    def evaluate(state: State) -> State:
        with torch.autocast(kind, dtype=dtype):
            images, structure = flatten(func(state))
        cast = [image.to(wanted) for image, wanted in zip(images, own, strict=True)]
        return unflatten(cast, structure)

    return evaluate


def in_full_precision(solver: Callable[..., R]) -> Callable[..., R]:
    """Let a solver of (func, start, ...) work without autocast, and its func with the caller's.

    Under autocast F may return another dtype; it is cast back to the state's.
    """

    @functools.wraps(solver)
    def solve(func: Callable[[State], State], start: State, **options: Any) -> R:
        leaves = flatten(start)[0]
        kind = leaves[0].device.type
        if not autocasts(kind):
            return solver(func, start, **options)
        evaluate = under_autocast(func, leaves, torch.get_autocast_dtype(kind))
        with full_precision(leaves[0].device):
            return solver(evaluate, start, **options)

    return solve
