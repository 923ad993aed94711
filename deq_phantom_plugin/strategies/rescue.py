"""What is done where an adjoint solve fails, as a policy says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .._plumbing.lockstep import any_of
from .._plumbing.precision import AutocastState
from ..adjoint import Packing, Solution
from ..adjoint.probe import with_probe
from ..contract.state import State, flatten
from ..contract.strategy import Context


class Rescue:
    """Warns, raises, or gives the samples whose adjoint solve failed the g of another strategy.

    Args:
        func: F.
        equilibrium: h*, detached.
        context: what else is known. Its `on_failure` is the policy.
    """

    def __init__(
        self, func: Callable[[State], State], equilibrium: State, context: Context
    ) -> None:
        assert context.on_failure is not None
        self._policy = context.on_failure
        self._func, self._equilibrium, self._context = func, equilibrium, context
        self._autocast = AutocastState(flatten(equilibrium)[0])

    @property
    def goes_on(self) -> bool:
        """Whether the other samples go on where one becomes NaN."""
        return self._policy.action != "raise"

    def __call__(
        self, strategy: str, tol: float, v: list[Tensor], g: list[Tensor], solution: Solution
    ) -> list[Tensor]:
        """Return g, replaced as the policy says in the samples in which the solve failed.

        Args:
            strategy: the spec of the strategy that solved, for messages.
            tol: the relative residual that the solve aimed at.
            v: the leaves of the gradient that came in.
            g: the leaves of the g that the solve found.
            solution: what else the solve found.

        Raises:
            ConvergenceError: if a sample failed, and that is the policy.
        """
        tol = max(tol, self._policy.tol)
        failed = ~(solution.residual <= tol)
        if bool(failed.any()):
            message = f"{strategy}: the adjoint solve left a relative residual above {tol:.1e}"
            self._policy.note("adjoint", failed, self._context.memory, message)
        if self._policy.fallback is None or not any_of(bool(failed.any())):
            return g
        with self._autocast():
            other = self._fallback(v)
        masks = Packing(v, self._context.sample_dim).spread(failed)
        return [torch.where(mask.bool(), b, a) for mask, a, b in zip(masks, g, other, strict=True)]

    def _fallback(self, v: Sequence[Tensor]) -> list[Tensor]:
        """Return the g of the policy's strategy: (dF/dz)^T g is its gradient."""
        with torch.enable_grad():
            probed, probes = with_probe(self._func, self._equilibrium)
            told = replace(self._context, on_failure=None, monitor=None)
            strategy = self._policy.fallback.resolve(told)
            attached = strategy.attach(probed, self._equilibrium, told)
            return list(torch.autograd.grad(flatten(attached)[0], probes, list(v)))
