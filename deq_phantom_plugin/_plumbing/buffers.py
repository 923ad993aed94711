"""The buffers of modules that run inside F, as they were."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy

from .compilation import hooks_unsaid


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

    def is_still(self, module: nn.Module, name: str) -> bool:
        """Whether a module has this buffer with this value."""
        buffer = module._buffers.get(name)
        if buffer is None or self.value is None:
            return buffer is self.buffer
        return buffer.shape == self.value.shape and torch.equal(buffer, self.value)

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
                if buffer is None or not is_lazy(buffer):  # or its first evaluation makes it
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
            with hooks_unsaid():
                yield
        finally:
            handle.remove()

    @property
    def have_changed(self) -> bool:
        """Whether a module that was noted has other buffers now."""
        return any(not seen.is_still(module, name) for (module, name), seen in self.seen.items())

    def put_back(self) -> None:
        """Give the modules their buffers back."""
        for (module, name), seen in self.seen.items():
            seen.put_back(module, name)
