"""Equilibria of this package's own, for `dpp.set_grad`, `dpp.model_report` and `dpp.monitor`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from .attaching import Attaching
from .host import Host
from .solve import Solve, add_observer


class Own(Host):
    """Finds `dpp.Equilibrium`, and what `deq-phantom patch` put into a model; there is no hook."""

    name = "own"
    package = "torch"
    pip = "torch"
    in_eval = "told"

    @property
    def is_enabled(self) -> bool:
        """False: nothing foreign is hooked."""
        return False

    def enable(self) -> None:
        """Do nothing."""

    def disable(self) -> None:
        """Do nothing."""

    def is_equilibrium(self, module: nn.Module) -> bool:
        """Whether a module attaches by itself, and names this host."""
        return isinstance(module, Attaching) and module.host == self.name

    def prepare_grad(self, module: nn.Module, spec: Any) -> Callable[[], None]:
        """See `Host.prepare_grad`."""
        assert isinstance(module, Attaching)
        module.strategy_of(spec)
        # As a spec: a loop whose steps come with each call makes a strategy of it for each.
        return functools.partial(setattr, module, "grad", spec)

    def observe(self, module: nn.Module, callback: Callable[[Solve], None]) -> Callable[[], None]:
        """See `Host.observe`; of a patched model's own solver the evaluations are not known, 0."""
        observers: Any = module.observers
        return add_observer(observers, callback)
