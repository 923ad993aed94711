"""Replaces the solve of silva-networks: adds observers, or attaches a strategy at its end.

silva-networks solves on one tensor. Its engine packs a state of several tensors into one vector
before, and `_Structure` remembers how, so that strategies and observers see the user's own state.
"""

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
    """The user's transition and state, of which silva-networks' solvers may see one flat vector.

    Attributes:
        transition: the transition F on the user's state.
        like: a state of several tensors, for their shapes; None if the solvers see the user's own
            state, a single tensor.
    """

    transition: Callable[[State], State]
    like: State | None = None

    def unpack(self, vector: Tensor) -> State:
        """Return the user's state of what the solvers see."""
        if self.like is None:
            return vector
        leaves, structure = flatten(self.like)
        parts = vector.split([leaf.numel() for leaf in leaves])
        shaped = [part.view(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
        return unflatten(shaped, structure)

    def pack(self, state: State) -> Any:
        """Return what the solvers see of the user's state: the inverse of `unpack`."""
        if self.like is None:
            return state
        return torch.cat([leaf.reshape(-1) for leaf in flatten(state)[0]])


class _Engine(threading.local):
    """The structure of the solve that an engine is about to begin in this thread."""

    structure: _Structure | None = None


_engine = _Engine()


def hook_engine(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let an engine pass on to its solve how it packs a state of several tensors."""

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

    Only the code of this function is used, inside silva-networks' module. So the function has to
    import what it needs.
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
    """Solve in place of silva-networks' `solve_equilibrium`, with the same arguments and result.

    A mode that names a strategy solves as silva-networks does, and attaches the strategy to the
    state. If there is a `backward_map`, the strategy differentiates it in place of `f`.
    """
    from silva_networks import solvers

    config = solvers.SolverConfig() if config is None else config
    structure, _engine.structure = _engine.structure, None  # solves inside of `f` must not take it
    structure = structure or _Structure(f)
    mode, replaced = config.backward_mode, solvers.solve_equilibrium
    memory, observers = None, []
    if isinstance(mode, Mode):
        memory = mode.extras.memory
        observers = [callback for (callback,) in mode.extras.observers]
    given = {"params": params, "tensors": tensors, "backward_map": backward_map}
    original = functools.partial(replaced.deq_phantom_original, f, z0, config, **given)
    # If the host only observes and is not enabled, names go to silva-networks itself.
    own = is_own(mode) or not replaced.deq_phantom_host.is_enabled
    if own and not (observers and torch.is_grad_enabled()):
        return original()
    # This is the only setting that tells whether the first dimension holds samples.
    batch_dim: BatchDim = "auto" if config.anderson_batch_dims == 1 else None
    context = Context(batch_dim=batch_dim, initial_state=structure.unpack(z0), memory=memory)
    func = structure.transition if backward_map is None else backward_map
    this = _Solve(config, structure, func, context, observers)
    return this.own(original()) if own else this.named(f, z0.detach())


@dataclass(frozen=True)
class _Solve:
    """A solve with a strategy or with observers.

    Attributes:
        config: the config of silva-networks.
        structure: the structure of the state.
        func: the map that is differentiated, on the user's state.
        context: the context for the strategy.
        observers: the callbacks that get the solve.
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
        result.z = self.structure.pack(attached)  # so that hooks on `attached` see the gradient
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
        """Return the context, with the solve's estimate of the inverse Jacobian if there is one."""
        if result.inverse_estimate is None:
            return self.context
        shared = _Shared.of(result.inverse_estimate, equilibrium)
        # silva-networks' estimate is one matrix for all samples together.
        return replace(self.context, batch_dim=None, solver_result=shared)


@dataclass(frozen=True)
class _Shared:
    """The inverse estimate of silva-networks' Broyden solve, in the form that `shine` takes."""

    estimate: Any

    @classmethod
    def of(cls, estimate: Any, state: State) -> Any:
        """Return a solver result that holds the estimate, for a state of this structure."""
        packing = Packing(flatten(state)[0], None)
        return SimpleNamespace(
            inverse_jacobian=SimpleNamespace(estimate=cls(estimate), packing=packing)
        )

    def transposed(self, rows: Tensor) -> Tensor:
        """Return an estimate of (I - J^T)^-1 x for a single row x, both of shape (1, D)."""
        vector = rows.reshape(self.estimate.shape)
        product: Tensor = self.estimate.apply_fixed_point_adjoint_inverse(vector)
        return product.reshape(rows.shape)
