"""Evaluations of F that leave no trace in the model or in the random state.

Probes, reports and monitors evaluate F in the middle of training. They do so in a `Trial`, so that
the training goes on as if they had not.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

from torch import Tensor, nn
from torch.utils import checkpoint
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from .buffers import Buffers
from .compilation import eager
from .random_state import forked_rng
from .trees import State, flatten


class _Running(threading.local):
    """How many trials this thread is inside of."""

    depth = 0


_running = _Running()


class Trial(AbstractContextManager["Trial"]):
    """Evaluate F inside a `with` block that leaves no trace.

    - The random state of the CPU and of the state's devices is restored at the end.
    - Buffers of modules that run in this thread (running statistics, vectors of power iterations)
      are restored at the end.
    - Compiled code runs uncompiled, since hooks do not see the modules inside of compiled code.
    - Selective activation checkpointing neither keeps nor hands out what is computed here.

    What F keeps elsewhere, such as in a list or a global variable, is not restored.

    Args:
        state: any state of the equilibrium, for its devices.

    Attributes:
        modules: the modules that ran, each once, in the order of their first run.
    """

    def __init__(self, state: State) -> None:
        self._leaves: Sequence[Tensor] = flatten(state)[0]
        self._buffers = Buffers()
        self._stack = ExitStack()

    @staticmethod
    def depth() -> int:
        """Return how many trials this thread is inside of; 0 in training itself."""
        return _running.depth

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that ran."""
        return list(self._buffers.modules)

    @property
    def has_changed_buffers(self) -> bool:
        """Whether a buffer of a module that ran has changed since before its first run."""
        return self._buffers.have_changed

    def __enter__(self) -> Trial:
        self._stack.enter_context(eager())
        self._stack.enter_context(_outside_selective_checkpoint())
        self._stack.enter_context(forked_rng(self._leaves))
        self._stack.callback(self._buffers.put_back)
        self._stack.enter_context(self._buffers.noting())
        _running.depth += 1
        return self

    def __exit__(self, *error: object) -> None:
        _running.depth -= 1
        self._stack.close()


def _outside_selective_checkpoint() -> AbstractContextManager[None]:
    """Leave a region of selective activation checkpointing, if this code runs in one.

    In the region's second run the mode hands out the results of the first one, by their number. A
    trial is not part of both runs. So what it computes would move all numbers behind it.
    """
    names = ("_CachingTorchDispatchMode", "_CachedTorchDispatchMode")
    kinds = tuple(getattr(checkpoint, name) for name in names if hasattr(checkpoint, name))
    if any(isinstance(mode, kinds) for mode in _get_current_dispatch_mode_stack()):
        return _disable_current_modes()
    return nullcontext()
