"""The gradient that `auto` compares others with, and what it finds out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._plumbing.lockstep import any_of
from ..adjoint import KrylovSpace, Linearization, Packing, Solution, relative_norm, solve
from ..contract.memory import Memory
from .candidates import LAMS, MARGIN, Judged, Runs, built_in, described, from_space, low
from .choice import SHARE, Numbers
from .ift import IFT
from .rescue import Rescue

POOR_REFERENCE = 1e-3
"""Residual of a reference above which it is not called one."""

SETTLED = 0.1
"""Relative residual up to which a state is at its equilibrium, as for `guard`."""

_REFERENCE = IFT(tol=POOR_REFERENCE, max_iter=100)
_AIM = IFT.tol  # of the solve within 50 products
_LOOK = 10  # products that find the radius where there is nothing to solve, as in `damping`


@dataclass(frozen=True)
class Reference:
    """The implicit gradient, as far as there is one.

    Attributes:
        v: the leaves of the gradient that came in.
        g: those of the reference, and of v itself in samples that are not at their equilibrium; of
            v in all where these are too many to solve for.
        off: the samples that are not, shape (B,).
        solution: what the solve found.
        residual: ||v - (I - J^T) g|| / ||v|| of each sample, shape (B,).
        space: its Krylov space.
        solved: whether it was to be solved.
    """

    v: Sequence[Tensor]
    g: list[Tensor]
    off: Tensor
    solution: Solution
    residual: Tensor
    space: KrylovSpace
    solved: bool

    def numbers(self, budget: int | None, runs: Runs | None) -> Numbers:
        """Judge the methods.

        Args:
            budget: the most products that a method may take.
            runs: of the user's methods; None for the built-in ones.
        """
        usable, rows = self.space.usable, int(self.space.usable.sum())
        good = (self.solution.residual <= POOR_REFERENCE) | self.solution.at_rounding
        lams = [*LAMS, *(MARGIN * lam for lam in LAMS)]
        radii = torch.zeros(len(lams), dtype=torch.float64, device="cpu")
        if rows:
            radii = -low(-self.space.radii(lams))
        if runs is not None and any_of(rows > 0):  # others may have samples
            judged = runs(self.v, self.g, usable)
        elif rows and self.solved:
            judged = from_space(self.space, _AIM, budget)
        else:
            methods = built_in(budget) if runs is None else described(runs.strategies)
            judged = Judged(methods, radii.new_zeros(len(methods), 3))
        return Numbers(
            judged,
            rows,
            settled=int((~self.off.cpu() & usable).sum()),
            compared=rows if self.solved else 0,
            supported=int((good.cpu() & usable).sum()) if self.solved else 0,
            radii=radii,
            broken=not all(bool(torch.isfinite(leaf).all()) for leaf in self.v),
        )


def reference(
    graph: Linearization,
    v: list[Tensor],
    batch_dim: int | None,
    memory: Memory | None = None,
    rescue: Rescue | None = None,
) -> Reference:
    """Solve for the implicit gradient by a solve that keeps its space.

    Args:
        graph: F at h*.
        v: the leaves of the gradient that came in.
        batch_dim: see `Context.batch_dim`.
        memory: of the equilibrium, which hears of doubts.
        rescue: acts where the solve failed.
    """
    packing = Packing(graph.inputs, batch_dim)
    counted = (packing.pack(v) != 0).any(dim=1)  # others have no gradient that could be off
    off = _off(graph, packing) & counted
    rows, settled = int(counted.sum()), int((counted & ~off).sum())
    if rows and settled / rows < SHARE:  # by the quotient that `Rule` looks at, to the bit
        space = KrylovSpace(_AIM, _LOOK, goes_on=False)
        _, solution = solve(
            graph.vjp, v, solver=space, tol=_AIM, max_vjp=_LOOK + 1, batch_dim=batch_dim
        )
        residual = _residual(solution, space, torch.ones_like(off))
        return Reference(v, list(v), off, solution, residual, space, solved=False)
    space = KrylovSpace(_AIM)
    g, solution = _REFERENCE.solved(graph.vjp, v, batch_dim, memory, rescue, solver=space)
    if batch_dim is None and solution.converged:
        _REFERENCE.say_drowned(graph.vjp, v, g, [leaf.detach() for leaf in graph.inputs])
    if bool(off.any()):
        masks = packing.spread(off)
        g = [torch.where(m.bool(), vi, gi) for m, vi, gi in zip(masks, v, g, strict=True)]
    return Reference(v, g, off, solution, _residual(solution, space, off), space, solved=True)


def _residual(solution: Solution, space: KrylovSpace, of_v: Tensor) -> Tensor:
    """Return the residuals of a solution, and of v itself in some samples."""
    if not bool(of_v.any()) or not len(space.usable):
        return solution.residual
    return torch.where(of_v, space.first_residual().to(solution.residual), solution.residual)


def _off(graph: Linearization, packing: Packing) -> Tensor:
    """Return which samples are not at their equilibrium, shape (B,)."""
    h, image = packing.pack(graph.inputs), packing.pack(graph.outputs)
    with torch.no_grad():
        return ~(relative_norm(image - h, image) <= SETTLED)
