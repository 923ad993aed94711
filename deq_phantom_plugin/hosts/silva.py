"""silva-networks: `SolverConfig(backward_mode="upg(k=5, lam=0.5)")`, and all that takes one.

Every model of silva-networks solves through one function, `solve_equilibrium`, whose code is
swapped: its modules hold references to it. The six modes of its own, among them "jfb" and "shine",
stay its own, bit for bit; ours of these names are "jfb()" and "shine()".
"""

from __future__ import annotations

import copy
import dataclasses
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..adjoint.packing import Packing
from ..contract.memory import Memory
from ..contract.state import State, flatten, unflatten
from ..contract.strategy import BatchDim, Context, GradStrategy
from ..strategies import BPTT, IFT, JFB, NPG, SHINE, UPG
from ..strategies.registry import get_strategy
from .host import PatchingHost, Solve, attach_observed, attaches_always, tell
from .patches import Patches

OWN_MODES = ("unrolled", "implicit", "phantom", "neumann", "jfb", "shine")

_SOLVERS = {"gmres": "gmres", "picard": "fixed_point", "anderson": "anderson", "broyden": "broyden"}
# Setting of a config -> our argument, and the value at which the setting says nothing.
_SETTINGS = {
    "phantom_steps": ("k", 1),
    "shine_refine_steps": ("refine", 0),
    "phantom_tau": ("lam", 1.0),
    "backward_solver": ("solver", "gmres"),
    "backward_max_iter": ("max_iter", 50),
    "backward_tol": ("tol", 1e-6),
}


class Silva(PatchingHost):
    """The hook into silva-networks 1.2."""

    name = "silva"
    package = "silva_networks"
    distribution = "silva-networks"
    known_versions = ("1.2.2",)
    pip = '"silva-networks==1.2.2" "numpy<2"'

    def patch(self, patches: Patches) -> None:
        """Hook the solve, the configs' checks, and the engine that packs several tensors."""

        def in_solvers(module: Any) -> None:
            patches.replace(module.SolverConfig, "__post_init__", _hook_check(self))
            patches.replace_code(module.solve_equilibrium, _solve_equilibrium)
            module.solve_equilibrium.deq_phantom_host = self
            patches.also(lambda: vars(module.solve_equilibrium).pop("deq_phantom_host", None))

        def in_engine(module: Any) -> None:
            patches.replace(module.SILVADEQEngine, "forward", _hook_engine)

        patches.when_imported("silva_networks.solvers", in_solvers)
        patches.when_imported("silva_networks.deq_engine", in_engine)

    def is_equilibrium(self, module: nn.Module) -> bool:
        """Whether a module solves by a config of silva-networks."""
        return _is_config(module.__dict__.get("config"))

    def prepare_grad(self, module: nn.Module, spec: Any) -> Callable[[], None]:
        """See `Host.prepare_grad`; modes of silva-networks are specs too."""
        if not _is_own(spec):
            get_strategy(spec)

        def switch() -> None:
            _with_mode(module, Mode.of(spec, _mode(module).extras))

        return switch

    def prepare_in_eval(self, module: nn.Module, in_eval: bool) -> Callable[[], None]:
        """See `Host.prepare_in_eval`; the framework does not look at the mode."""
        return attaches_always(self, in_eval)

    def observe(self, module: nn.Module, callback: Callable[[Solve], None]) -> Callable[[], None]:
        """See `Host.observe`; a config does not know whether its module trains."""
        observers = _mode(module).extras.observers
        release, observation = self.hold(), (callback,)
        observers.append(observation)

        def end() -> None:
            observers[:] = [known for known in observers if known is not observation]
            release()

        return end


@dataclass
class Extras:
    """What an equilibrium has besides its config.

    Attributes:
        memory: the module's.
        observers: what is called after a solve, each in a tuple of its own; not copied or saved.
    """

    memory: Memory
    observers: list[tuple[Callable[[Solve], None]]] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        return {"memory": self.memory, "observers": []}


class Mode(str):
    """A `backward_mode` that carries a spec and extras: layers make new configs of their own.

    Attributes:
        spec: what was asked for.
        extras: those of the module that it was made for.
    """

    spec: Any
    extras: Extras

    @classmethod
    def of(cls, spec: Any, extras: Extras) -> Mode:
        """Return the mode of a spec."""
        mode = cls(spec if isinstance(spec, str) else repr(get_strategy(spec)))
        mode.spec, mode.extras = spec, extras
        return mode


def _mode(module: nn.Module) -> Mode:
    """Return a module's mode, made if its config has a plain one, or that of another module."""
    config: Any = module.config
    mode, memory = config.backward_mode, getattr(module, "grad_memory", None)
    if isinstance(mode, Mode) and mode.extras.memory is memory:
        return mode
    if memory is None:
        module.grad_memory = memory = Memory()
    made = Mode.of(mode.spec if isinstance(mode, Mode) else mode, Extras(memory))
    _with_mode(module, made)
    return made


def _with_mode(module: Any, mode: Mode) -> None:
    """Give a module a config of its own with a mode, which is known to be valid."""
    config = copy.copy(module.config)
    object.__setattr__(config, "backward_mode", mode)
    module.config = config


def _spec(mode: Any) -> Any:
    return mode.spec if isinstance(mode, Mode) else mode


def _is_config(value: Any) -> bool:
    modules = [sys.modules.get(f"silva_networks.{name}") for name in ("solvers", "deq_engine")]
    if None in modules:
        return False
    solvers, engine = modules
    return isinstance(value, solvers.SolverConfig | engine.SILVADEQConfig)  # type: ignore


def _is_own(mode: Any) -> bool:
    return isinstance(mode, str) and mode in OWN_MODES


def _strategy(config: Any) -> GradStrategy:
    """Return the strategy of a config's mode.

    Raises:
        ValueError: if the mode is neither silva-networks' nor a spec.
    """
    defaults = {}
    for setting, (argument, says_nothing) in _SETTINGS.items():
        value = getattr(config, setting)
        if value != says_nothing:
            defaults[argument] = _SOLVERS[value] if setting == "backward_solver" else value
    return get_strategy(_spec(config.backward_mode), defaults)


def _equivalent(config: Any) -> GradStrategy:
    """Return the strategy that silva-networks' own mode amounts to."""
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
    # Also what it does with a mode that it does not know.
    return IFT(
        _SOLVERS[config.backward_solver], tol=config.backward_tol, max_iter=config.backward_max_iter
    )


# --- hooks ------------------------------------------------------------------------------------


def _hook_check(host: Silva) -> Callable[[Any], Any]:
    def hook(original: Callable[[Any], None]) -> Callable[[Any], None]:
        def __post_init__(self: Any) -> None:
            mode = self.backward_mode
            if _is_own(mode) or not host.is_enabled:
                original(self)
                return
            object.__setattr__(self, "backward_mode", "jfb")  # for its checks of all the rest
            try:
                original(self)
            finally:
                object.__setattr__(self, "backward_mode", mode)
            try:
                _strategy(self)
            except ValueError as error:
                raise ValueError(
                    f"backward_mode={_spec(mode)!r}: {error}; silva-networks' own are "
                    f"{', '.join(OWN_MODES)}"
                ) from None

        return __post_init__

    return hook


@dataclass(frozen=True)
class _Structure:
    """A transition of several tensors, which silva-networks' solvers see as one vector."""

    transition: Callable[[State], State]
    like: State

    def unpack(self, vector: Tensor) -> State:
        leaves, structure = flatten(self.like)
        parts = vector.split([leaf.numel() for leaf in leaves])
        shaped = [part.view(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
        return unflatten(shaped, structure)

    def pack(self, state: State) -> Tensor:
        return torch.cat([leaf.reshape(-1) for leaf in flatten(state)[0]])


class _Engine(threading.local):
    """The structure of the solve that an engine of this thread is about to begin."""

    structure: _Structure | None = None


_engine = _Engine()


@contextmanager
def _solving(structure: _Structure) -> Any:
    before, _engine.structure = _engine.structure, structure
    try:
        yield
    finally:
        _engine.structure = before


def _hook_engine(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, transition: Any, init_state: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(init_state, Tensor):
            return original(self, transition, init_state, *args, **kwargs)
        with _solving(_Structure(transition, init_state)):
            return original(self, transition, init_state, *args, **kwargs)

    return forward


def _solve_equilibrium(f, z0, config=None, *, params=(), tensors=(), backward_map=None):  # type: ignore[no-untyped-def]
    """Solve an equilibrium with the configured forward and backward mode.

    Only this function's code is used, inside silva-networks: it has to import what it needs.
    """
    from deq_phantom_plugin.hosts.silva import solve

    return solve(f, z0, config, params=params, tensors=tensors, backward_map=backward_map)


def solve(
    f: Callable[[Tensor], Tensor],
    z0: Tensor,
    config: Any = None,
    *,
    params: Any = (),
    tensors: Any = (),
    backward_map: Callable[[Tensor], Tensor] | None = None,
) -> Any:
    """Stand in for silva-networks' `solve_equilibrium`, whose signature this is.

    A named mode solves as the others do and attaches its strategy to the state; without autograd
    the state is the solver's. A `backward_map` is what the strategy differentiates.
    """
    from silva_networks import solvers

    config = solvers.SolverConfig() if config is None else config
    structure, _engine.structure = _engine.structure, None  # not for solves inside this one
    mode = config.backward_mode
    extras = mode.extras if isinstance(mode, Mode) else None
    observers = [callback for (callback,) in extras.observers] if extras is not None else []
    # While the host only observes, names mean to silva-networks what they do without it.
    own = _is_own(mode) or not solvers.solve_equilibrium.deq_phantom_host.is_enabled
    if own and not (observers and torch.is_grad_enabled()):
        original = solvers.solve_equilibrium.deq_phantom_original
        return original(f, z0, config, params=params, tensors=tensors, backward_map=backward_map)
    func, start = f if backward_map is None else backward_map, z0
    if structure is not None and backward_map is None:
        func, start = structure.transition, structure.unpack(z0)
    # The only setting that says whether there are samples.
    batch_dim: BatchDim = "auto" if config.anderson_batch_dims == 1 else None
    memory = extras.memory if extras is not None else None
    context = Context(batch_dim=batch_dim, initial_state=start, memory=memory)
    if own:
        original = solvers.solve_equilibrium.deq_phantom_original
        result = original(f, z0, config, params=params, tensors=tensors, backward_map=backward_map)
        result.z = result.z.view_as(result.z)
        found, strategy = result.z.detach(), _equivalent(config)
        attached = result.z if structure is None else structure.unpack(result.z)
        if structure is not None:  # the engine takes apart what it is given, and observers hook
            result.z = structure.pack(attached)
    else:
        strategy = _strategy(config).resolve(context)
        if strategy.owns_solve and torch.is_grad_enabled():
            found = z0.detach()
            result = solvers.SolverResult(found, [], 0, False, repr(strategy))
        else:
            with torch.no_grad():
                result = solvers.fixed_point(f, z0.detach(), config)
            found = result.z.detach()
        result.info.setdefault("backward_mode", repr(strategy))
    equilibrium = structure.unpack(found) if structure is not None else found
    if result.inverse_estimate is not None:
        # Its estimate is of the whole state at once.
        context = dataclasses.replace(
            context, batch_dim=None, solver_result=_Shared.of(result.inverse_estimate, equilibrium)
        )
    taken = result.iterations
    if own:
        tell(observers, func, equilibrium, attached, strategy, context, taken)
    else:
        attached = attach_observed(observers, func, equilibrium, strategy, context, taken)
        result.z = structure.pack(attached) if structure is not None else attached
    return result


@dataclass(frozen=True)
class _Shared:
    """The estimate that silva-networks' Broyden solve shares, as `shine` takes it."""

    estimate: Any

    @classmethod
    def of(cls, estimate: Any, state: State) -> Any:
        packing = Packing(flatten(state)[0], None)
        return SimpleNamespace(
            inverse_jacobian=SimpleNamespace(estimate=cls(estimate), packing=packing)
        )

    def transposed(self, rows: Tensor) -> Tensor:
        """Return an estimate of (I - J^T)^-1 x for the one row x, shape (1, D)."""
        vector = rows.reshape(self.estimate.shape)
        product: Tensor = self.estimate.apply_fixed_point_adjoint_inverse(vector)
        return product.reshape(rows.shape)
