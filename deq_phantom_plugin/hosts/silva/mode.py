"""The `backward_mode` of a config of silva-networks: a spec, the strategy of it, and its check.

Layers of silva-networks make new configs from their own, and pass the mode on. So a `Mode` is a
string that carries the spec, the memory and the observers of its module along.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ...contract.memory import Memory
from ...contract.strategy import GradStrategy
from ...strategies import BPTT, IFT, JFB, NPG, SHINE, UPG
from ...strategies.registry import get_strategy
from ..host import Host
from ..settings import defaults
from ..solve import Observers

OWN_MODES = ("unrolled", "implicit", "phantom", "neumann", "jfb", "shine")
"""The modes that silva-networks has itself."""

# Maps the names of silva-networks' solvers to ours.
_SOLVERS = {"gmres": "gmres", "picard": "fixed_point", "anderson": "anderson", "broyden": "broyden"}
# Maps settings of a config to our argument, and the setting's default; see `defaults`.
_SETTINGS = {
    "phantom_steps": ("k", 1),
    "shine_refine_steps": ("refine", 0),
    "phantom_tau": ("lam", 1.0),
    "backward_solver": ("solver", "gmres"),
    "backward_max_iter": ("max_iter", 50),
    "backward_tol": ("tol", 1e-6),
}


@dataclass
class Extras:
    """What an equilibrium has besides its config.

    Attributes:
        memory: the memory of the module; None until the module gets a strategy. So a module that is
            only observed has no step in its `state_dict`.
        observers: the callbacks that get each solve. They are not copied or saved.
    """

    memory: Memory | None = None
    observers: Observers = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        return {"memory": self.memory, "observers": []}


class Mode(str):
    """A `backward_mode` that carries a spec and the extras of a module.

    Attributes:
        spec: the spec, or a mode of silva-networks.
        extras: the extras of the module that the mode was made for.
    """

    spec: Any
    extras: Extras

    @classmethod
    def of(cls, spec: Any, extras: Extras) -> Mode:
        """Return the mode of a spec."""
        mode = cls(spec if isinstance(spec, str) else repr(get_strategy(spec)))
        mode.spec, mode.extras = spec, extras
        return mode


def mode_of(module: nn.Module) -> Mode:
    """Return the `Mode` of a module.

    If the config has a plain string or the mode of another module, a new `Mode` is made, and given
    to the module.
    """
    config: Any = module.config
    mode, extras = config.backward_mode, getattr(module, "grad_extras", None)
    if isinstance(mode, Mode) and mode.extras is extras:
        return mode
    if extras is None:
        extras = Extras(getattr(module, "grad_memory", None))
        module.__dict__["grad_extras"] = extras
    made = Mode.of(mode.spec if isinstance(mode, Mode) else mode, extras)
    give_mode(module, made)
    return made


def give_mode(module: Any, mode: Mode) -> None:
    """Give a module a config of its own with a mode that is known to be valid."""
    config = copy.copy(module.config)
    object.__setattr__(config, "backward_mode", mode)
    module.config = config


def _spec(mode: Any) -> Any:
    """Return the spec of a `Mode`; any other value is a spec itself."""
    return mode.spec if isinstance(mode, Mode) else mode


def is_own(mode: Any) -> bool:
    """Whether a mode is one of silva-networks' own."""
    return isinstance(mode, str) and mode in OWN_MODES


def strategy_of(config: Any) -> GradStrategy:
    """Return the strategy of a config's mode.

    Raises:
        ValueError: if the mode is no valid spec.
    """
    known = defaults(functools.partial(getattr, config), _SETTINGS, _SOLVERS)
    return get_strategy(_spec(config.backward_mode), known)


def equivalent(config: Any) -> GradStrategy:
    """Return the strategy that corresponds to silva-networks' own mode."""
    if config.backward_mode == "phantom":
        return UPG(config.phantom_steps, config.phantom_tau)
    if config.backward_mode == "neumann":
        return NPG(config.neumann_terms, config.alpha)
    if config.backward_mode == "jfb":
        return JFB()
    if config.backward_mode == "shine":
        return SHINE(config.shine_refine_steps, fallback=None)
    if config.backward_mode == "unrolled":
        return BPTT(config.max_iter)
    # "implicit", and what silva-networks does with a mode that it does not know.
    return IFT(
        _SOLVERS[config.backward_solver], tol=config.backward_tol, max_iter=config.backward_max_iter
    )


def hook_check(host: Host) -> Callable[[Any], Any]:
    """Let a config take a spec as its `backward_mode`, while the host is enabled."""

    def hook(original: Callable[[Any], None]) -> Callable[[Any], None]:
        def __post_init__(self: Any) -> None:
            mode = self.backward_mode
            if is_own(mode) or not host.is_enabled:
                original(self)
                return
            # silva-networks checks all settings at once, so it gets a mode that it accepts.
            object.__setattr__(self, "backward_mode", "jfb")
            try:
                original(self)
            finally:
                object.__setattr__(self, "backward_mode", mode)
            try:
                strategy_of(self)
            except ValueError as error:
                raise ValueError(
                    f"backward_mode={_spec(mode)!r}: {error}; silva-networks' own are "
                    f"{', '.join(OWN_MODES)}"
                ) from None

        return __post_init__

    return hook
