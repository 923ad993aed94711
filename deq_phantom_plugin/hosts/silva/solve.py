"""The solve of silva-networks: its own, observed, or with a strategy attached at its end."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ...adjoint.packing import Packing
from ...contract.state import State, flatten, unflatten
from ...contract.strategy import BatchDim, Context
from ..solve import Solve, attach_observed, tell
from .mode import Mode, equivalent, is_own, strategy_of


@dataclass(frozen=True)
class _Structure:
    """A transition, of several tensors perhaps, which silva-networks' solvers see as one vector.

    Attributes:
        transition: on the user's state.
        like: a state of several tensors; None where the solvers see the user's own.
    """

    transition: Callable[[State], State]
    like: State | None = None

    def unpack(self, vector: Tensor) -> State:
        if self.like is None:
            return vector
        leaves, structure = flatten(self.like)
        parts = vector.split([leaf.numel() for leaf in leaves])
        shaped = [part.view(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
        return unflatten(shaped, structure)

    def pack(self, state: State) -> Any:
        if self.like is None:
            return state
        return torch.cat([leaf.reshape(-1) for leaf in flatten(state)[0]])


class _Engine(threading.local):
    """The structure of the solve that an engine of this thread is about to begin."""

    structure: _Structure | None = None


_engine = _Engine()


def hook_engine(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let an engine tell its solve how it packs a state of several tensors."""

    def forward(self: Any, transition: Any, init_state: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(init_state, Tensor):
            return original(self, transition, init_state, *args, **kwargs)
        before, _engine.structure = _engine.structure, _Structure(transition, init_state)
        try:
            return original(self, transition, init_state, *args, **kwargs)
        finally:
            _engine.structure = before

    return forward


def solve_equilibrium(f, z0, config=None, *, params=(), tensors=(), backward_map=None):  # type: ignore[no-untyped-def]
    """Solve an equilibrium with the configured forward and backward mode.

    Only this function's code is used, inside silva-networks: it has to import what it needs.
    """
    from deq_phantom_plugin.hosts.silva.solve import solve

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
    structure = structure or _Structure(f)
    mode, replaced = config.backward_mode, solvers.solve_equilibrium
    memory, observers = None, []
    if isinstance(mode, Mode):
        memory = mode.extras.memory
        observers = [callback for (callback,) in mode.extras.observers]
    given = {"params": params, "tensors": tensors, "backward_map": backward_map}
    original = functools.partial(replaced.deq_phantom_original, f, z0, config, **given)
    # While the host only observes, names mean to silva-networks what they do without it.
    own = is_own(mode) or not replaced.deq_phantom_host.is_enabled
    if own and not (observers and torch.is_grad_enabled()):
        return original()
    # The only setting that says whether there are samples.
    batch_dim: BatchDim = "auto" if config.anderson_batch_dims == 1 else None
    context = Context(batch_dim=batch_dim, initial_state=structure.unpack(z0), memory=memory)
    func = structure.transition if backward_map is None else backward_map
    this = _Solve(config, structure, func, context, observers)
    return this.own(original()) if own else this.named(f, z0.detach())


@dataclass(frozen=True)
class _Solve:
    """A solve that a strategy or an observer takes part in.

    Attributes:
        config: silva-networks'.
        structure: of the state.
        func: what is differentiated, on the user's state.
        context: what a strategy is told.
        observers: what to call with the solve.
    """

    config: Any
    structure: _Structure
    func: Callable[[Any], Any]
    context: Context
    observers: list[Callable[[Solve], None]]

    def own(self, result: Any) -> Any:
        """Tell observers of a solve with silva-networks' own gradient."""
        result.z = result.z.view_as(result.z)
        attached, equilibrium = (self.structure.unpack(z) for z in (result.z, result.z.detach()))
        result.z = self.structure.pack(attached)  # the engine takes it apart, and observers hook
        context = self._ended(result, equilibrium)
        strategy, taken = equivalent(self.config), result.iterations
        tell(self.observers, self.func, equilibrium, attached, strategy, context, taken)
        return result

    def named(self, f: Callable[[Tensor], Tensor], start: Tensor) -> Any:
        """Solve as silva-networks does, without autograd, and attach the strategy."""
        from silva_networks import solvers

        strategy = strategy_of(self.config).resolve(self.context)
        if strategy.owns_solve and torch.is_grad_enabled():
            result = solvers.SolverResult(start, [], 0, False, repr(strategy))
        else:
            with torch.no_grad():
                result = solvers.fixed_point(f, start, self.config)
        result.info.setdefault("backward_mode", repr(strategy))
        equilibrium = self.structure.unpack(result.z.detach())
        context, taken = self._ended(result, equilibrium), result.iterations
        attached = attach_observed(self.observers, self.func, equilibrium, strategy, context, taken)
        result.z = self.structure.pack(attached)
        return result

    def _ended(self, result: Any, equilibrium: State) -> Context:
        """Return the context with what the solve learned of the inverse Jacobian."""
        if result.inverse_estimate is None:
            return self.context
        shared = _Shared.of(result.inverse_estimate, equilibrium)
        # Its estimate is of the whole state at once.
        return replace(self.context, batch_dim=None, solver_result=shared)


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
