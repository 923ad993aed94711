"""Evaluations of F that leave no trace: what probes, reports and monitors do."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from .compilation import eager
from .state import State, flatten


class _Running(threading.local):
    """How many trials this thread is in."""

    depth = 0


_running = _Running()


class Trial(AbstractContextManager["Trial"]):
    """Evaluate F inside a `with` block that leaves the world as it was.

    Random state is forked, on the CPU and on the devices of the state. Modules that run are
    noted, and their buffers (running statistics, vectors of power iterations) are put back. What
    was compiled runs as it was written, or none of its modules would be seen.

    Only modules that this thread runs are looked after. State that F keeps elsewhere, in a list
    or a global, is not.

    Args:
        state: any state of the equilibrium, for its devices.
        compiled: whether what was compiled runs compiled all the same, where time is measured; the
            modules in it are not seen then.

    Attributes:
        modules: what ran, in order of their first run; each once.
    """

    def __init__(self, state: State, compiled: bool = False) -> None:
        self._compiled = compiled
        self._leaves: Sequence[Tensor] = flatten(state)[0]
        self._thread = threading.get_ident()
        self._kept: dict[nn.Module, list[tuple[str, Tensor | None, Tensor | None]]] = {}
        self._stack = ExitStack()

    @staticmethod
    def depth() -> int:
        """How many trials this thread is in; what is logged of training is outside of all."""
        return _running.depth

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that ran."""
        return list(self._kept)

    def __enter__(self) -> Trial:
        if not self._compiled:
            self._stack.enter_context(eager())
        self._stack.enter_context(forked_rng(self._leaves))
        self._stack.callback(self._put_back)
        handle = register_module_forward_pre_hook(self._note)
        self._stack.callback(handle.remove)
        _running.depth += 1
        return self

    def __exit__(self, *error: object) -> None:
        _running.depth -= 1
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


@contextmanager
def forked_rng(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Put the random state back after a `with` block: the CPU's and that of the leaves' devices."""
    by_type: dict[str, set[int]] = {}
    for leaf in leaves:
        if leaf.device.type != "cpu":
            index = leaf.device.index
            by_type.setdefault(leaf.device.type, set()).add(0 if index is None else index)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind, indices in by_type.items():
            if kind not in ("meta", "mps"):  # which have no state, and one that belongs to no index
                stack.enter_context(
                    torch.random.fork_rng(devices=sorted(indices), device_type=kind)
                )
        yield
