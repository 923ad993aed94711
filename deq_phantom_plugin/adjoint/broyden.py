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
    """Solve (I - J^T) x = rhs by Broyden's first method.

    Source: Broyden 1965, "A class of methods for solving nonlinear simultaneous equations". Costs
    one product per iteration. Memory holds one vector per iteration, see `InverseEstimate`.

    Args:
        apply: x -> J^T x, on rows of shape (B, D).
        rhs: rows of norm one, or of zeros, shape (B, D).
        tol: the residual ||rhs - (I - J^T) x|| to reach in every sample.
        max_vjp: the largest number of products.
        start: the x to begin with, shape (B, D); `rhs` if None.
        inverse: a first estimate of (I - J^T)^-1, on rows of shape (B, D); the identity if None.

    Raises:
        NonFiniteError: if a product makes a NaN or an infinity in a sample that is being solved.
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
