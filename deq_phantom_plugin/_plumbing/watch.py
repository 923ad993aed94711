"""Sees which modules draw random numbers, or change their buffers, while they run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from .random_state import is_same, random_state


class Watch(ExitStack):
    """Looks at the random state and at buffers whenever a module's forward begins or ends.

    Args:
        leaves: the leaves of the state, for their devices.

    Attributes:
        drew: names of the types of modules in whose own code the random state moved.
        updated: names of the types of modules whose buffers changed.
    """

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        super().__init__()
        self.drew: set[str] = set()
        self.updated: set[str] = set()
        self._leaves = leaves
        self._running: list[tuple[nn.Module, list[Tensor]]] = []
        self._state = random_state(leaves)

    def __enter__(self) -> Watch:
        self.callback(register_module_forward_pre_hook(self._begin).remove)
        self.callback(register_module_forward_hook(self._end).remove)
        return self

    def look(self) -> None:
        """If random state moved since the last look, note the innermost module that runs."""
        state = random_state(self._leaves)
        if not is_same(self._state, state):
            self.drew.add(type(self._running[-1][0]).__name__ if self._running else "F itself")
        self._state = state

    def _begin(self, module: nn.Module, args: Any) -> None:
        self.look()
        self._running.append((module, [buffer.clone() for buffer in _own_buffers(module)]))

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.look()
        _, before = self._running.pop()
        if any(
            a.shape != b.shape or not torch.equal(a, b)
            for a, b in zip(before, _own_buffers(module), strict=False)
        ):
            self.updated.add(type(module).__name__)


def _own_buffers(module: nn.Module) -> Iterator[Tensor]:
    return (buffer for buffer in module._buffers.values() if buffer is not None)
