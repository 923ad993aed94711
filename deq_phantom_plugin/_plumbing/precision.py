"""Autocast: F runs under the caller's autocast, and a solver's own arithmetic without it.

Under autocast a solver would take inner products in 16 bits. So solvers work in the dtype of the
state, and what F returns is cast back to that dtype.
"""

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
    """Whether autocast is on for a type of device, such as "cuda"."""
    # `is_autocast_enabled` raises for devices without autocast, such as "meta".
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Switch autocast off inside a `with` block: inner products must not be taken in 16 bits."""
    if not autocasts(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


class AutocastState:
    """Remembers the autocast settings of now, for later evaluations of F.

    Args:
        leaves: the leaves of a state. The settings of their devices and of the CPU are kept.
    """

    def __init__(self, leaves: Iterable[Tensor]) -> None:
        self._settings = [
            (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
            for device in sorted({"cpu", *(leaf.device.type for leaf in leaves)})
            if torch.amp.is_autocast_available(device)
        ]

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Restore the settings inside a `with` block."""
        with contextlib.ExitStack() as stack:
            for device, dtype, enabled in self._settings:
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
            yield


def under_autocast(
    func: Callable[[State], State], like: Sequence[Tensor], dtype: torch.dtype
) -> Callable[[State], State]:
    """Return F under autocast; its results are cast back to the dtypes of the state.

    Args:
        func: F.
        like: the leaves of a state, for their dtypes and their device.
        dtype: the dtype to which autocast casts.
    """
    kind, own = like[0].device.type, [leaf.dtype for leaf in like]

    def evaluate(state: State) -> State:
        with torch.autocast(kind, dtype=dtype):
            images, structure = flatten(func(state))
        cast = [image.to(wanted) for image, wanted in zip(images, own, strict=True)]
        return unflatten(cast, structure)

    return evaluate


def in_full_precision(solver: Callable[..., R]) -> Callable[..., R]:
    """Decorate a solver of (func, start, ...): it works without autocast, `func` with the caller's.

    Under autocast `func` may return another dtype. The result is cast back to the state's dtype.
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
