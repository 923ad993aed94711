"""Broyden's method on the linear system."""

from __future__ import annotations

import torch
from torch import Tensor

from .inverse_estimate import InverseEstimate, Product
from .progress import Apply, Progress, Solution


def broyden(
    apply: Apply,
    rhs: Tensor,
    tol: float,
    max_vjp: int,
    start: Tensor | None = None,
    inverse: Product | None = None,
) -> Solution:
    """Solve (I - J^T) x = rhs by Broyden's first method (Broyden 1965).

    Takes one product an iteration and keeps one vector for each, see `InverseEstimate`.

    Args:
        apply: the product with J^T.
        rhs: the right-hand side, shape (B, D).
        tol: the residual to reach.
        max_vjp: the most products to take.
        start: where to begin, shape (B, D); at `rhs` if None.
        inverse: a first estimate of (I - J^T)^-1, on (B, D) matrices; the identity if None.
    """
    progress = Progress(apply, rhs, tol, max_vjp)
    estimate = InverseEstimate(rhs, max_vjp, initial=inverse)
    x = rhs if start is None else start
    while True:
        residual = torch.sub(rhs + progress.apply(x), x, out=estimate.room)
        if progress.record(x, residual) or progress.exhausted:
            estimate.release()
            return progress.solution()
        x = x + estimate.step(progress.active)
