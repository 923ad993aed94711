"""Remembers the buffers of modules that run inside F, and puts them back.

An evaluation of F changes buffers such as the running statistics of a batch normalisation. Some
evaluations must leave no trace: those of a trial (`trial.py`). They note the buffers of each
module before it runs, and restore them at the end.

Values and places are told apart. A tensor gets the values back that it had when it was first seen.
A module gets another tensor back only where its own code has put a new one in its place. Where F
calls `torch.func.functional_call`, the module runs with tensors that are lent to it, and has its
own again afterwards: they stay.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
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

    def has_value_of(self, buffer: Tensor | None) -> bool:
        """Whether a buffer has the value that this one had."""
        if buffer is None or self.value is None:
            return buffer is self.buffer
        return buffer.shape == self.value.shape and torch.equal(buffer, self.value)

    def restore(self) -> None:
        """Give the buffer its value again."""
        if self.buffer is not None and self.value is not None:
            # `.data` does not count as a change, so graphs that have saved the buffer stay valid.
            self.buffer.data.copy_(self.value)

    def put_back(self, module: nn.Module, name: str) -> None:
        """Give the module this buffer and this value again."""
        self.restore()
        module._buffers[name] = self.buffer


def version(buffer: Tensor | None) -> int:
    """Return PyTorch's count of a buffer's changes in place; -1 where PyTorch does not count."""
    return -1 if buffer is None or buffer.is_inference() else buffer._version


def held(module: nn.Module, name: str) -> Tensor | None:
    """Return what a module holds as its buffer of a name; None if it has none."""
    # A scripted module has a mapping without `get`.
    buffer: Tensor | None = module._buffers[name] if name in module._buffers else None  # noqa: SIM401
    return buffer


_Places = dict[tuple[nn.Module, str], Tensor | None]
"""What modules hold as their buffers, by module and name."""


def _places(modules: Iterable[nn.Module]) -> _Places:
    return {(m, name): buffer for m in modules for name, buffer in m._buffers.items()}


class _Rebound(NamedTuple):
    """A buffer in whose place a module's code has put another one."""

    module: nn.Module
    name: str
    before: Tensor | None
    after: Tensor | None


class Buffers:
    """The buffers of modules, as they were when each module was first noted.

    Attributes:
        modules: the modules that were noted, each once, in the order of their first run.
        seen: their buffers, by module and name.
    """

    def __init__(self) -> None:
        self.modules: dict[nn.Module, None] = {}
        self.seen: dict[tuple[nn.Module, str], Seen] = {}
        self._values: dict[int, Seen] = {}  # of every buffer that was met, by its id
        self._given: _Places = {}  # of modules that were noted by hand
        self._rebound: list[_Rebound] = []
        self._new: set[int] = set()  # ids of the buffers that modules have made since

    def note(self, module: nn.Module) -> None:
        """Remember the buffers of a module as they are now, unless it was noted before.

        At the end the module holds the very same tensors again.
        """
        if module not in self.modules:
            self._given.update(_places([module]))
            self._note(module)

    def _note(self, module: nn.Module) -> None:
        """Remember those of a module's buffers that were not met before.

        In a later run it may hold others: a teacher's, and then its own.
        """
        self.modules[module] = None
        for name, buffer in module._buffers.items():
            if buffer is not None and (is_lazy(buffer) or id(buffer) in self._new):
                continue  # a lazy one has no value yet
            seen = None if buffer is None else self._values.get(id(buffer))
            if seen is None:
                seen = Seen.now(buffer)
                if buffer is not None:
                    self._values[id(buffer)] = seen
            self.seen.setdefault((module, name), seen)

    def _compare(self, before: _Places) -> None:
        """Take note of the buffers in whose places there are others now."""
        for (module, name), buffer in before.items():
            after = held(module, name)
            if after is not buffer:
                self._rebound.append(_Rebound(module, name, buffer, after))
                if id(after) not in self._values:
                    self._new.add(id(after))

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note every module that this thread runs inside a `with` block."""
        thread = threading.get_ident()
        running: list[tuple[nn.Module, _Places]] = []

        def begin(module: nn.Module, args: Any) -> None:
            if threading.get_ident() == thread:
                self._note(module)
                # The outermost one may put buffers into the modules below it.
                running.append((module, _places([module] if running else module.modules())))

        def end(module: nn.Module, args: Any, output: Any) -> None:
            if threading.get_ident() == thread and running and running[-1][0] is module:
                self._compare(running.pop()[1])

        # PyTorch calls `end` after an exception too.
        handles = [
            register_module_forward_pre_hook(begin),
            register_module_forward_hook(end, always_call=True),
        ]
        try:
            with hooks_unsaid():
                yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def have_changed(self) -> bool:
        """Whether a buffer has another value now, or a module has put another one in its place."""
        if not all(seen.has_value_of(seen.buffer) for seen in self._values.values()):
            return True
        for (module, name), seen in self.seen.items():
            now = held(module, name)
            is_own = now is not seen.buffer and self._first(module, name) is seen.buffer
            if is_own and not seen.has_value_of(now):
                return True
        return False

    def _first(self, module: nn.Module, name: str) -> Tensor | None:
        """Return what a module held before its code has put others in its place."""
        first = held(module, name)
        for change in reversed(self._rebound):
            if change.module is module and change.name == name and change.after is first:
                first = change.before
        return first

    def put_back(self) -> None:
        """Give all buffers their values back, and all modules their buffers."""
        for seen in self._values.values():
            seen.restore()
        self._compare(self._given)
        for module, name in dict.fromkeys((r.module, r.name) for r in self._rebound):
            module._buffers[name] = self._first(module, name)
