"""Evaluations of F that leave no trace: what probes, reports and monitors do."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from .compilation import eager
from .draws import forked_rng
from .state import State, flatten


class Trial(AbstractContextManager["Trial"]):
    """Evaluate F inside a `with` block that leaves the world as it was.

    Random state is forked, on the CPU and on the devices of the state. Modules that run are
    noted, and their buffers (running statistics, vectors of power iterations) are put back. What
    was compiled runs as it was written, or none of its modules would be seen.

    Only modules that this thread runs are looked after. State that F keeps elsewhere, in a list
    or a global, is not.

    Args:
        state: any state of the equilibrium, for its devices.

    Attributes:
        modules: what ran, in order of their first run; each once.
    """

    def __init__(self, state: State) -> None:
        self._leaves: Sequence[Tensor] = flatten(state)[0]
        self._thread = threading.get_ident()
        self._kept: dict[nn.Module, list[tuple[str, Tensor | None, Tensor | None]]] = {}
        self._stack = ExitStack()

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that ran."""
        return list(self._kept)

    @property
    def has_changed_buffers(self) -> bool:
        """Whether a module that ran has other buffers than before it first ran."""
        return any(
            module._buffers.get(name) is not buffer or not _equal(buffer, value)
            for module, buffers in self._kept.items()
            for name, buffer, value in buffers
        )

    def __enter__(self) -> Trial:
        self._stack.enter_context(eager())
        self._stack.enter_context(forked_rng(self._leaves))
        self._stack.callback(self._put_back)
        handle = register_module_forward_pre_hook(self._note)
        self._stack.callback(handle.remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _note(self, module: nn.Module, args: Any) -> None:
        if threading.get_ident() == self._thread and module not in self._kept:
            self._kept[module] = [
                (name, buffer, None if buffer is None else buffer.detach().clone())
                for name, buffer in module._buffers.items()
            ]

    def _put_back(self) -> None:
        with torch.no_grad():
            for module, buffers in self._kept.items():
                for name, buffer, value in buffers:
                    if buffer is not None and value is not None:
                        # `.data`: graphs that hold the buffer are not to take it for changed.
                        buffer.data.copy_(value)
                    module._buffers[name] = buffer


def _equal(buffer: Tensor | None, value: Tensor | None) -> bool:
    if buffer is None or value is None:
        return buffer is value
    return buffer.shape == value.shape and torch.equal(buffer, value)
