"""Remembers the buffers of modules that run inside F, and puts them back.

An evaluation of F changes buffers such as the running statistics of a batch normalisation. Some
evaluations must leave no trace: those of a trial (`trial.py`). They note the buffers of each
module before it runs, and restore them at the end.
"""

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
    """A buffer as it was at one moment.

    Attributes:
        buffer: the tensor itself; None if the module's buffer of that name is None.
        version: PyTorch's count of changes in place.
        value: a copy of the values; None if they are not known.
    """

    buffer: Tensor | None
    version: int
    value: Tensor | None

    @classmethod
    def now(cls, buffer: Tensor | None) -> Seen:
        """Return a buffer as it is at this moment."""
        return cls(buffer, version(buffer), None if buffer is None else buffer.detach().clone())

    def is_still(self, module: nn.Module, name: str) -> bool:
        """Whether the module's buffer of that name still has this value."""
        buffer = module._buffers.get(name)
        if buffer is None or self.value is None:
            return buffer is self.buffer
        return buffer.shape == self.value.shape and torch.equal(buffer, self.value)

    def put_back(self, module: nn.Module, name: str) -> None:
        """Give the module this buffer and this value again."""
        if self.buffer is not None and self.value is not None:
            # `.data` does not count as a change, so graphs that have saved the buffer stay valid.
            self.buffer.data.copy_(self.value)
        module._buffers[name] = self.buffer


def version(buffer: Tensor | None) -> int:
    """Return PyTorch's count of a buffer's changes in place; -1 where PyTorch does not count."""
    return -1 if buffer is None or buffer.is_inference() else buffer._version


class Buffers:
    """The buffers of modules, as they were when each module was first noted.

    Attributes:
        modules: the modules that were noted, each once, in the order of their first run.
        seen: their buffers, by module and name.
    """

    def __init__(self) -> None:
        self.modules: dict[nn.Module, None] = {}
        self.seen: dict[tuple[nn.Module, str], Seen] = {}

    def note(self, module: nn.Module) -> None:
        """Remember the buffers of a module as they are now, unless it was noted before."""
        if module not in self.modules:
            self.modules[module] = None
            for name, buffer in module._buffers.items():
                if buffer is None or not is_lazy(buffer):  # a lazy one has no value yet
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
        """Whether a buffer of a noted module has another value now."""
        return any(not seen.is_still(module, name) for (module, name), seen in self.seen.items())

    def put_back(self) -> None:
        """Give all noted modules their buffers back."""
        for (module, name), seen in self.seen.items():
            seen.put_back(module, name)
