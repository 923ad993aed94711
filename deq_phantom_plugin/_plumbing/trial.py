"""Evaluations of F that leave no trace: what probes, reports and monitors do."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack

from torch import Tensor, nn

from .buffers import Buffers
from .compilation import eager
from .random_state import forked_rng
from .trees import State, flatten


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

    Attributes:
        modules: what ran, in order of their first run; each once.
    """

    def __init__(self, state: State) -> None:
        self._leaves: Sequence[Tensor] = flatten(state)[0]
        self._buffers = Buffers()
        self._stack = ExitStack()

    @staticmethod
    def depth() -> int:
        """How many trials this thread is in; what is logged of training is outside of all."""
        return _running.depth

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that ran."""
        return list(self._buffers.modules)

    @property
    def has_changed_buffers(self) -> bool:
        """Whether a module that ran has other buffers than before it first ran."""
        return self._buffers.have_changed

    def __enter__(self) -> Trial:
        self._stack.enter_context(eager())
        self._stack.enter_context(forked_rng(self._leaves))
        self._stack.callback(self._buffers.put_back)
        self._stack.enter_context(self._buffers.noting())
        _running.depth += 1
        return self

    def __exit__(self, *error: object) -> None:
        _running.depth -= 1
        self._stack.close()
