"""Evaluations of F that leave no trace: what probes, reports and monitors do."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from .compilation import eager
from .state import State, flatten


class Seen(NamedTuple):
    """A buffer as it was when it was looked at.

    Attributes:
        buffer: the tensor; None where a module has none of that name.
        version: how often PyTorch counts that it was changed in place.
        value: a copy; None where it is not known.
    """

    buffer: Tensor | None
    version: int
    value: Tensor | None

    @classmethod
    def now(cls, buffer: Tensor | None) -> Seen:
        """Look at a buffer."""
        return cls(buffer, version(buffer), None if buffer is None else buffer.detach().clone())

    def put_back(self, module: nn.Module, name: str) -> None:
        """Give a module this buffer with this value."""
        if self.buffer is not None and self.value is not None:
            # `.data`: graphs that hold the buffer are not to take it for changed.
            self.buffer.data.copy_(self.value)
        module._buffers[name] = self.buffer


def version(buffer: Tensor | None) -> int:
    """Return how often a buffer was changed in place, as far as PyTorch counts."""
    return -1 if buffer is None or buffer.is_inference() else buffer._version


class Buffers:
    """The buffers of modules as they were: running statistics, vectors of power iterations.

    Attributes:
        modules: those that were noted, in order; each once.
        seen: their buffers, by module and name.
    """

    def __init__(self) -> None:
        self.modules: dict[nn.Module, None] = {}
        self.seen: dict[tuple[nn.Module, str], Seen] = {}

    def note(self, module: nn.Module) -> None:
        """Keep the buffers of a module as they are, if it is not known yet."""
        if module not in self.modules:
            self.modules[module] = None
            for name, buffer in module._buffers.items():
                self.seen[module, name] = Seen.now(buffer)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note every module that this thread runs inside a `with` block."""
        thread = threading.get_ident()

        def note(module: nn.Module, args: Any) -> None:
            if threading.get_ident() == thread:
                self.note(module)

        handle = register_module_forward_pre_hook(note)
        try:
            yield
        finally:
            handle.remove()

    def put_back(self) -> None:
        """Give the modules their buffers back."""
        for (module, name), seen in self.seen.items():
            seen.put_back(module, name)


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
        self._buffers = Buffers()
        self._stack = ExitStack()

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that ran."""
        return list(self._buffers.modules)

    def __enter__(self) -> Trial:
        self._stack.enter_context(eager())
        self._stack.enter_context(forked_rng(self._leaves))
        self._stack.callback(self._buffers.put_back)
        self._stack.enter_context(self._buffers.noting())
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()


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
