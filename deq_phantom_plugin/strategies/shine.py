"""SHINE: the inverse-Jacobian estimate of the forward solve, used in backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adjoint import Apply, Linearization, Packing, Solution, broyden, solve
from ..contract.state import State
from ..contract.strategy import BackwardStats, Context, GradStrategy
from .arguments import positive_float, whole_number
from .registry import register_strategy


def no_estimate(strategy: GradStrategy, solve: str) -> ValueError:
    """Return the error for a strategy that needs an estimate where the solve has none.

    Args:
        strategy: the strategy.
        solve: the forward solve, in words.
    """
    return ValueError(
        f"{strategy!r} needs the inverse-Jacobian estimate of a quasi-Newton forward solve, and "
        f"{solve} has none to share; use solver='broyden' with dpp.Equilibrium, "
        "f_solver='broyden_fast' with TorchDEQ, or "
        "deq_phantom_plugin.forward.broyden(..., keep_inverse=True) as the context's solver_result"
    )


@register_strategy("shine")
@dataclass(frozen=True, repr=False)
class SHINE(GradStrategy):
    """g = B v, with the estimate B of (I - J^T)^-1 that the forward solve already has.

    Source: Ramzi et al. 2022, "SHINE: SHaring the INverse Estimate from the forward pass for
    bi-level optimization and implicit models". It needs a quasi-Newton forward solve that hands out
    its estimate: TorchDEQ's `f_solver="broyden_fast"`, or `context.solver_result` from
    `deq_phantom_plugin.forward.broyden(..., keep_inverse=True)`. The value is F(h*).

    Where the estimate is poor, g is much longer than v. Such a sample falls back to g = v (their
    section 3, "fallback"). Refinement begins from either g (their "refine"). Where samples depend
    on one another, the estimates of the samples are the diagonal blocks of the estimate for the
    batch. The batch is then trusted, refined and judged as one system.

    Costs one evaluation of F, one backward pass and, with `refine`, `refine` + 1 vector-Jacobian
    products. Memory holds one graph and the steps of the solver: one vector per iteration, or up to
    twice as many where the solve stopped early.

    Args:
        refine: the number of Broyden iterations on (I - J^T) g = v. They begin with that g and that
            estimate.
        fallback: the largest ||g|| / ||v|| of a sample that is trusted; None trusts all samples.

    Raises:
        ValueError: if an argument is out of range. In `attach`, if the forward solve has no
            estimate to share, or if its samples lie along another dimension.
    """

    refine: int = 0
    fallback: float | None = 1.3

    def __post_init__(self) -> None:
        object.__setattr__(self, "refine", whole_number("refine", self.refine))
        if self.fallback is not None:
            object.__setattr__(self, "fallback", positive_float("fallback", self.fallback))

    @property
    def wants_inverse_jacobian(self) -> bool:
        """Yes."""
        return True

    @property
    def needs_inverse_jacobian(self) -> bool:
        """Yes."""
        return True

    def attach(self, func: Callable[[State], State], equilibrium: State, context: Context) -> State:
        """See `GradStrategy.attach`."""
        inverse = getattr(context.solver_result, "inverse_jacobian", None)
        if inverse is None:
            raise no_estimate(self, "this one")
        if None not in (inverse.packing.batch_dim, context.sample_dim) and (
            inverse.packing.batch_dim != context.sample_dim
        ):
            raise ValueError(
                f"{self!r} in a context with batch_dim={context.sample_dim}: the forward solver's "
                f"estimate is of samples along dimension {inverse.packing.batch_dim}. Pass that as "
                "batch_dim, or solve along the other"
            )
        graph = Linearization(func, equilibrium, self)
        monitor, blocks, estimate = context.monitor, inverse.packing, inverse.estimate
        together = context.sample_dim is None and blocks.batch_dim is not None
        packing = Packing(graph.inputs, None) if together else blocks

        def product(rows: Tensor) -> Tensor:
            own = blocks.pack(packing.unpack(rows)) if together else rows
            image: Tensor = estimate.transposed(own)
            return packing.pack(blocks.unpack(image)) if together else image

        def adjoint(v: list[Tensor]) -> list[Tensor]:
            rows = packing.pack(v)
            first = product(rows)
            trusted = self._trusted(rows, first)[:, None]

            def guess(rows: Tensor) -> Tensor:
                return torch.where(trusted, product(rows), rows)

            g: list[Tensor]
            n_vjp, residual = 0, None
            if self.refine == 0:
                g = packing.unpack(torch.where(trusted, first, rows))
            else:
                g, solution = solve(
                    graph.vjp,
                    v,
                    solver=functools.partial(_refined, guess),
                    tol=0.0,
                    max_vjp=self.refine + 1,
                    batch_dim=packing.batch_dim,
                    packing=packing,
                )
                n_vjp, residual = solution.n_vjp, solution.residual
            if monitor is not None:
                monitor(BackwardStats(repr(self), n_vjp, residual))
            return g

        return graph.attach(graph.outputs, adjoint)

    def _trusted(self, v: Tensor, g: Tensor) -> Tensor:
        """Return the samples whose g is trusted, shape (B,). A g that is not finite never is."""
        length = torch.linalg.vector_norm(g, dim=1)
        trusted = torch.isfinite(length)
        if self.fallback is not None:
            trusted = trusted & (length <= self.fallback * torch.linalg.vector_norm(v, dim=1))
        return trusted


def _refined(guess: Any, apply: Apply, rhs: Tensor, tol: float, max_vjp: int) -> Solution:
    return broyden(apply, rhs, tol, max_vjp, start=guess(rhs), inverse=guess)
