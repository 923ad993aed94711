"""IFT: implicit differentiation, the adjoint system solved iteratively."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .._plumbing.once import warn_once
from ..adjoint import (
    VJP,
    AdjointSolver,
    Linearization,
    Solution,
    check_solver,
    fixed_point,
    implicit,
    solve,
)
from ..contract.errors import ConvergenceWarning, NonFiniteError
from ..contract.memory import Memory
from ..contract.state import State
from ..contract.strategy import BackwardStats, Context, GradStrategy
from .arguments import boolean, positive_float, positive_int, positive_or_none
from .registry import register_strategy
from .rescue import Rescue


@register_strategy("ift")
@dataclass(frozen=True, repr=False)
class IFT(GradStrategy):
    """The implicit gradient: g solves (I - J^T) g = v (implicit function theorem).

    Bai, Kolter & Koltun 2019, "Deep Equilibrium Models", Theorem 1. F is linearised at h*; the
    value is F(h*). Stopping short of `tol` warns once a run, with the residual; a NaN or an
    infinity that the solve makes is an error, one that comes in passes through.

    Costs one evaluation of F, and one vector-Jacobian product an iteration on the one graph that
    memory holds, besides the solver's own vectors (gmres: one a product, at most 50).

    Args:
        solver: "gmres", "bicgstab", "anderson", "broyden" or "fixed_point". The default
            alone never makes the residual worse from one product to the next, which decides near
            rho(J) = 1: on symmetric maps of radius 0.99 it took 44 products to 1e-4, the others
            60 and more (benchmarks/adjoint_solvers.py, float32, restarted every 20).
        tol: ||v - (I - J^T) g|| / ||v|| to reach in every sample. A solve also ends where products
            do not improve the residual beyond the rounding of F, as in 16 bits; with a `tol` other
            than the default that warns.
        max_iter: the most vector-Jacobian products.
        warm_start: whether to begin with the last step's g, for a product or two more and where
            that is better than to begin without. For training on one and the same batch, such as a
            single graph; needs a memory, as hosts have, which keeps g (`dpp.memory_state_dict`).
        higher_order: whether the gradient can be differentiated again, to any order, for gradient
            penalties and MAML. Memory then holds h* and what F captures, and no graph; backward
            evaluates F once more, so F must do the same each time, and what it captures must be
            used in ordinary operations of PyTorch.
        clip: the longest product, off unless it is given: each J^T g of the fixed-point iteration
            g <- v + J^T g that is longer than clip ||v|| is scaled down to that, for each sample
            with the norm of all its leaves (of the batch, where samples are coupled). Where the
            last one was, g solves g = v + c J^T g with a c < 1, another equation: the residual
            stays that of the system above, at the cost of one product more, so that such samples
            have not converged, which warns once and is a failure to `guard`. The monitor is told
            how many were. Not for other solvers, a warm start or `higher_order`, which rely on a
            product being linear.

    Raises:
        ValueError: if an argument is out of range, or `clip` goes with what it is not for.
    """

    solver: str = "gmres"
    tol: float = 1e-4
    max_iter: int = 50
    warm_start: bool = False
    higher_order: bool = False
    clip: float | None = None

    def __post_init__(self) -> None:
        check_solver(self.solver)
        object.__setattr__(self, "tol", positive_float("tol", self.tol))
        object.__setattr__(self, "max_iter", positive_int("max_iter", self.max_iter))
        boolean("warm_start", self.warm_start)
        boolean("higher_order", self.higher_order)
        object.__setattr__(self, "clip", positive_or_none("clip", self.clip))
        if self.clip is not None:
            self._check_clip()

    def _check_clip(self) -> None:
        """Refuse a clip beside what relies on J^T g being linear in g."""
        only = {"solver": "fixed_point", "warm_start": False, "higher_order": False}
        for name, accepted in only.items():
            value = getattr(self, name)
            if value != accepted:
                raise ValueError(
                    f"clip={self.clip!r} with {name}={value!r}, which relies on products that are "
                    f"linear, as clipped ones are not; expected {name}={accepted!r}, or clip=None"
                )

    def attach(self, func: Callable[[State], State], equilibrium: State, context: Context) -> State:
        """See `GradStrategy.attach`."""
        # Only what backward needs to know is kept until then.
        batch_dim, memory, monitor = context.sample_dim, context.memory, context.monitor
        rescue = Rescue(func, equilibrium, context) if context.on_failure else None

        def adjoint(vjp: VJP, v: list[Tensor]) -> list[Tensor]:
            g, solution = self.solved(vjp, v, batch_dim, memory, rescue)
            if monitor is not None:
                monitor(stats_of(self, solution))
            return g

        if self.higher_order:
            inner = lambda vjp, v: self.solved(vjp, v, batch_dim)[0]  # noqa: E731
            return implicit(func, equilibrium, adjoint, inner, self)
        graph = Linearization(func, equilibrium, self)
        return graph.attach(graph.outputs, lambda v: adjoint(graph.vjp, v))

    def solved(
        self,
        vjp: VJP,
        v: list[Tensor],
        batch_dim: int | None,
        memory: Memory | None = None,
        rescue: Rescue | None = None,
        solver: AdjointSolver | None = None,
    ) -> tuple[list[Tensor], Solution]:
        """Return g and what else the solve found; warns, or lets a rescue act, where it failed.

        Args:
            vjp: J^T.
            v: the leaves of the gradient that came in.
            batch_dim: see `Context.batch_dim`.
            memory: of the equilibrium, which keeps a warm start and hears of doubts.
            rescue: acts where the solve failed.
            solver: takes the place of the one that is named.

        Raises:
            NonFiniteError: if the solve makes a NaN or an infinity.
        """
        named = self.solver if self.clip is None else partial(fixed_point, clip=self.clip)
        kept = memory if self.warm_start else None
        # The solve relies on what was found of samples: where it fails, that is asked again.
        doubted = memory if batch_dim is not None else None
        try:
            g, solution = solve(
                vjp,
                v,
                solver=named if solver is None else solver,
                tol=self.tol,
                max_vjp=self.max_iter,
                batch_dim=batch_dim,
                start=None if kept is None else _last(kept, v),
                without_broken=rescue is not None and rescue.goes_on,
            )
        except NonFiniteError as error:
            if doubted is not None:
                doubted.doubt()
            raise NonFiniteError(
                f"{self!r}, adjoint solve: {error}. If samples depend on one another and batch_dim "
                "says otherwise, pass batch_dim=None in the context"
            ) from None
        if not solution.converged and doubted is not None:
            doubted.doubt()
        if rescue is not None:
            g = rescue(repr(self), self.tol, v, g, solution)
        elif not solution.converged:
            self._warn(solution, of_user=solver is None)
        if kept is not None:
            for name, leaf in zip(_names(g), g, strict=True):
                kept.keep(name, leaf)
        return g, solution

    def _warn(self, solution: Solution, of_user: bool) -> None:
        """Say where a solve stopped; at rounding only if the tolerance was a user's choice."""
        above = solution.residual > self.tol
        short, rounded = int((above & ~solution.at_rounding).sum()), int(solution.at_rounding.sum())
        reached = (
            f"{self!r}: the adjoint solve stopped after {solution.n_vjp} vector-Jacobian products "
            f"with relative residual {solution.residual.max():.1e}"
        )
        if short and solution.n_clipped:
            warn_once(
                "ift with clip",
                f"{reached}; {short} of {above.numel()} samples are above tol, and "
                f"{solution.n_clipped} products were clipped, each counted once a sample. Where "
                "the last one was, g solves g = v + c J^T g with a c < 1 in place of the adjoint "
                "system. Raise clip, or regularise the Jacobian (dpp.jacobian_reg). This warning "
                "is given once.",
                ConvergenceWarning,
            )
        elif short:
            warn_once(
                "ift",
                f"{reached}; {short} of {above.numel()} samples are above tol. Raise max_iter or "
                "tol, try solver='gmres', or regularise the Jacobian (dpp.jacobian_reg). If "
                "samples depend on one another (graphs, batch norm inside F) and batch_dim says "
                "otherwise, pass batch_dim=None in the context. This warning is given once.",
                ConvergenceWarning,
            )
        elif rounded and of_user and self.tol != IFT.tol:
            warn_once(
                "ift in low precision",
                f"{reached}: in {rounded} of {above.numel()} samples that is the rounding of F's "
                "own products, which more of them do not improve. Raise tol, or let F compute in "
                "a higher precision. This warning is given once.",
                ConvergenceWarning,
            )


def stats_of(strategy: GradStrategy, solution: Solution) -> BackwardStats:
    """Return what a monitor is told of a solve."""
    return BackwardStats(
        repr(strategy), solution.n_vjp, solution.residual, solution.trace, solution.n_clipped
    )


def _names(leaves: list[Tensor]) -> list[str]:
    return [f"adjoint_{index}" for index in range(len(leaves))]


def _last(memory: Memory, like: list[Tensor]) -> list[Tensor] | None:
    """Return the g of the last step, None if there is none that fits."""
    kept = [memory.warm_start(name, v) for name, v in zip(_names(like), like, strict=True)]
    found = [leaf for leaf in kept if leaf is not None and bool(torch.isfinite(leaf).all())]
    return found if len(found) == len(kept) else None
