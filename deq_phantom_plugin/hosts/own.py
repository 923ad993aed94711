"""The host of this package's own equilibria: `dpp.Equilibrium`, and those of patched repositories.

These modules take specs by themselves, so that nothing is hooked. Through the host `dpp.set_grad`,
`dpp.model_report` and `dpp.monitor` find them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from .attaching import Attaching
from .host import Host
from .solve import Solve, add_observer


class Own(Host):
    """Finds `dpp.Equilibrium`, and the modules that `deq-phantom patch` puts into a model."""

    name = "own"
    package = "torch"
    pip = "torch"
    in_eval = "told"

    @property
    def is_enabled(self) -> bool:
        """False: no foreign framework is hooked."""
        return False

    def enable(self) -> None:
        """Do nothing: there is no hook."""

    def disable(self) -> None:
        """Do nothing: there is no hook."""

    def is_equilibrium(self, module: nn.Module) -> bool:
        """Whether a module is an `Attaching` of this host."""
        return isinstance(module, Attaching) and module.host == self.name

    def prepare_grad(self, module: nn.Module, spec: Any) -> Callable[[], None]:
        """See `Host.prepare_grad`."""
        assert isinstance(module, Attaching)
        module.strategy_of(spec)
        # The spec is kept, not the strategy: a loop whose number of steps may change with each call
        # makes a strategy from the spec in each call.
        return functools.partial(setattr, module, "grad", spec)

    def observe(self, module: nn.Module, callback: Callable[[Solve], None]) -> Callable[[], None]:
        """See `Host.observe`. `Solve.nfe` is 0 if a patched model has a solver of its own."""
        observers: Any = module.observers
        return add_observer(observers, callback)
