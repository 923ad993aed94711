"""The host of silva-networks: `SolverConfig(backward_mode="upg(k=5, lam=0.5)")`.

Every model of silva-networks solves through one function, `solve_equilibrium`. Its modules hold
references to that function, so the host replaces the code inside of it. The six modes of
silva-networks compute the same as before, to the bit. Among them are "jfb" and "shine". To get our
strategies of these names, write "jfb()" and "shine()".
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from ...strategies.registry import get_strategy
from ..host import PatchingHost
from ..patches import Patches
from ..settings import memory_of
from ..solve import Solve, add_observer
from .mode import Mode, give_mode, hook_check, is_own, mode_of
from .solve import hook_engine, solve_equilibrium


class Silva(PatchingHost):
    """The hook into silva-networks 1.2."""

    name = "silva"
    package = "silva_networks"
    distribution = "silva-networks"
    known_versions = ("1.2.2",)
    pip = '"silva-networks==1.2.2" "numpy<2"'
    in_eval = "always"

    def patch(self, patches: Patches) -> None:
        """Hook the solve, the check of configs, and the engine that packs several tensors."""

        def in_solvers(module: Any) -> None:
            patches.replace(module.SolverConfig, "__post_init__", hook_check(self))
            patches.replace_code(module.solve_equilibrium, solve_equilibrium)
            module.solve_equilibrium.deq_phantom_host = self
            patches.also(lambda: vars(module.solve_equilibrium).pop("deq_phantom_host", None))

        def in_engine(module: Any) -> None:
            patches.replace(module.SILVADEQEngine, "forward", hook_engine)

        patches.when_imported("silva_networks.solvers", in_solvers)
        patches.when_imported("silva_networks.deq_engine", in_engine)

    def acts_disabled(self, spec: Any) -> bool:
        """See `Host.acts_disabled`. Modes of silva-networks itself act at any time."""
        return spec is None or is_own(spec)

    def is_equilibrium(self, module: nn.Module) -> bool:
        """Whether a module has a config of silva-networks."""
        return _is_config(module.__dict__.get("config"))

    def prepare_grad(self, module: nn.Module, spec: Any) -> Callable[[], None]:
        """See `Host.prepare_grad`. The modes of silva-networks are valid, too."""
        if not is_own(spec):
            get_strategy(spec)

        def switch() -> None:
            extras = mode_of(module).extras
            extras.memory = memory_of(module)
            give_mode(module, Mode.of(spec, extras))

        return switch

    def observe(self, module: nn.Module, callback: Callable[[Solve], None]) -> Callable[[], None]:
        """See `Host.observe`. Solves in evaluation mode are told as well, if autograd is on.

        A config does not know in which mode its module is.
        """
        observers = mode_of(module).extras.observers
        release = self.hold()
        forget = add_observer(observers, callback)

        def end() -> None:
            forget()
            release()

        return end


def _is_config(value: Any) -> bool:
    """Whether a value is a config of silva-networks; False if that is not loaded."""
    modules = [sys.modules.get(f"silva_networks.{name}") for name in ("solvers", "deq_engine")]
    if None in modules:
        return False
    solvers, engine = modules
    return isinstance(value, solvers.SolverConfig | engine.SILVADEQConfig)  # type: ignore
