"""IFT: implicit differentiation, the adjoint system solved iteratively."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .._plumbing.lockstep import active
from .._plumbing.once import warn_once
from ..adjoint import (
    VJP,
    AdjointSolver,
    Linearization,
    Solution,
    check_solver,
    drowns,
    fixed_point,
    implicit,
    solve,
)
from ..contract.errors import ConvergenceWarning, NonFiniteError
from ..contract.memory import Memory
from ..contract.state import State, flatten
from ..contract.strategy import BackwardStats, Context, GradStrategy
from .arguments import boolean, positive_float, positive_int, positive_or_none
from .registry import register_strategy
from .rescue import Rescue


@register_strategy("ift")
@dataclass(frozen=True, repr=False)
class IFT(GradStrategy):
    """The implicit gradient: g solves (I - J^T) g = v (implicit function theorem).

    Source: Bai, Kolter & Koltun 2019, "Deep Equilibrium Models", Theorem 1. F is linearised at h*,
    and the value is F(h*).

    A solve that stops short of `tol` warns once per run, with the residual that it reached. A NaN
    or an infinity that the solve makes is an error. One that comes in with v passes through, so
    that a gradient scaler sees it.

    Costs one evaluation of F, and one vector-Jacobian product per iteration. Memory holds one
    graph, and the vectors of the solver: `gmres` keeps one per product, at most 50.

    Args:
        solver: "gmres", "bicgstab", "anderson", "broyden" or "fixed_point". Only the default never
            makes the residual worse from one product to the next, which decides near rho(J) = 1.
            Example: on symmetric maps of radius 0.99, restarted every 20 products in float32, it
            took 44 products to 1e-4, and the others took 60 and more
            (benchmarks/adjoint_solvers.py).
        tol: the relative residual ||v - (I - J^T) g|| / ||v|| to reach in every sample. A solve
            also ends where products do not improve the residual beyond the rounding of F, as in 16
            bits. That warns only if `tol` is not the default.
        max_iter: the largest number of vector-Jacobian products.
        warm_start: whether to begin with the g of the last step. It costs a product or two, and is
            used in the samples where it is better than to begin with zero. It is for training on
            one and the same batch, such as a single graph. It needs a memory, which keeps g
            (`dpp.memory_state_dict`); hosts have one.
        higher_order: whether the gradient can be differentiated again, to any order, for gradient
            penalties and MAML. Memory then holds h* and what F captures, and no graph. Backward
            evaluates F once more, so F must do the same each time, and it must use what it
            captures in ordinary operations of PyTorch.
        clip: the largest length of a product J^T g, in multiples of ||v||; None, the default, does
            not clip. In the fixed-point iteration g <- v + J^T g a longer product is scaled down to
            clip ||v||. The norm is that of all leaves of a sample, or of the batch where samples
            are coupled. Where the last product was clipped, g solves another equation,
            g = v + c J^T g with a c < 1. The residual stays that of the system above, for one more
            product. Such a sample has not converged: that warns once, and `guard` takes it for a
            failure. The monitor is told how many products were clipped. Other solvers, a warm start
            and `higher_order` need products that are linear in g, and refuse a clip.

    Raises:
        ValueError: if an argument is out of range, or if `clip` meets an argument that refuses it.
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
        """Refuse a clip beside arguments that need J^T g to be linear in g."""
        only = {"solver": "fixed_point", "warm_start": False, "higher_order": False}
        for name, accepted in only.items():
            value = getattr(self, name)
            if value != accepted:
                raise ValueError(
                    f"clip={self.clip!r} with {name}={value!r}: that needs products J^T g that are "
                    "linear in g, and clipped products are not; expected "
                    f"{name}={accepted!r}, or clip=None"
                )

    def attach(self, func: Callable[[State], State], equilibrium: State, context: Context) -> State:
        """See `GradStrategy.attach`."""
        # `adjoint` keeps these alive until backward, and not the whole context.
        batch_dim, memory, monitor = context.sample_dim, context.memory, context.monitor
        rescue = Rescue(func, equilibrium, context) if context.on_failure else None
        h = flatten(equilibrium)[0] if batch_dim is None and self.clip is None else None

        def adjoint(vjp: VJP, v: list[Tensor]) -> list[Tensor]:
            g, solution = self.solved(vjp, v, batch_dim, memory, rescue)
            if h is not None and solution.converged:
                self.say_drowned(vjp, v, g, h)
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
        """Return g and the result of the solve.

        Where the solve failed, `rescue` acts; without one, a warning is given.

        Args:
            vjp: from the leaves of a state g to the leaves of J^T g.
            v: the leaves of the gradient that came in.
            batch_dim: see `Context.batch_dim`.
            memory: the equilibrium's. It keeps a warm start, and is told to ask again whether
                samples are coupled where the solve failed.
            rescue: acts where the solve failed.
            solver: takes the place of `self.solver`.

        Raises:
            NonFiniteError: if the solve makes a NaN or an infinity.
        """
        named = self.solver if self.clip is None else partial(fixed_point, clip=self.clip)
        kept = memory if self.warm_start else None
        # The solve relies on samples that were found independent. Where it fails, that is in doubt.
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
                "says that they do not, pass batch_dim=None in the context"
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

    def say_drowned(self, vjp: VJP, v: list[Tensor], g: list[Tensor], h: list[Tensor]) -> None:
        """Warn once where the residual of one system is small because of a few of its parts.

        For the arguments see `drowns`.
        """
        # Processes in lockstep would wait for a product that only one of them takes.
        if active() is None and drowns(vjp, v, g, h, self.tol):
            warn_once(
                "ift of unequal parts",
                f"{self!r}: the gradient that comes in is far larger where the state is small, as "
                "behind a head that divides the state of each node by its length. The residual is "
                f"below tol={self.tol} because of these few numbers, and the gradient of all "
                "others may be wrong. Solve for the state in units of its length, h = size * u "
                "with u = F(size * u) / size (IGNN of this package does so), or take 'upg' or "
                "'npg'. This warning is given once.",
                ConvergenceWarning,
            )

    def _warn(self, solution: Solution, of_user: bool) -> None:
        """Warn where a solve stopped short.

        A stop at F's rounding is mentioned only where a user chose `tol`: with the default nobody
        asked for more digits than F has.
        """
        above = solution.residual > self.tol
        short, rounded = int((above & ~solution.at_rounding).sum()), int(solution.at_rounding.sum())
        reached = (
            f"{self!r}: the adjoint solve stopped after {solution.n_vjp} vector-Jacobian products "
            f"with relative residual {solution.residual.max():.1e}"
        )
        if short and solution.n_clipped:
            warn_once(
                "ift with clip",
                f"{reached}; {short} of {above.numel()} samples are above tol, so their gradient "
                f"is not the exact one. {solution.n_clipped} products were clipped, each counted "
                "once per sample. Where the last one was, g solves g = v + c J^T g with a c < 1 in "
                "place of the adjoint system. Raise clip, or regularise the Jacobian "
                "(dpp.jacobian_reg). This warning is given once.",
                ConvergenceWarning,
            )
        elif short:
            better = "" if self.solver == "gmres" else "try solver='gmres', "
            warn_once(
                "ift",
                f"{reached}; {short} of {above.numel()} samples are above tol, so their gradient "
                f"is less exact than you asked for. Raise max_iter or tol, {better}regularise the "
                "Jacobian (dpp.jacobian_reg), or take a gradient that does not solve ('upg'). If "
                "samples depend on one another (graphs, batch norm inside F) and batch_dim says "
                "that they do not, pass batch_dim=None in the context. This warning is given once.",
                ConvergenceWarning,
            )
        elif rounded and of_user and self.tol != IFT.tol:
            warn_once(
                "ift in low precision",
                f"{reached}: in {rounded} of {above.numel()} samples that is the rounding of F's "
                "own products, and more products do not improve it. Raise tol, or let F compute in "
                "a higher precision. This warning is given once.",
                ConvergenceWarning,
            )


def stats_of(strategy: GradStrategy, solution: Solution) -> BackwardStats:
    """Return what a monitor is told about a solve."""
    return BackwardStats(
        repr(strategy), solution.n_vjp, solution.residual, solution.trace, solution.n_clipped
    )


def _names(leaves: list[Tensor]) -> list[str]:
    return [f"adjoint_{index}" for index in range(len(leaves))]


def _last(memory: Memory, like: list[Tensor]) -> list[Tensor] | None:
    """Return the g of the last step; None if there is none of these shapes that is finite."""
    kept = [memory.warm_start(name, v) for name, v in zip(_names(like), like, strict=True)]
    found = [leaf for leaf in kept if leaf is not None and bool(torch.isfinite(leaf).all())]
    return found if len(found) == len(kept) else None
