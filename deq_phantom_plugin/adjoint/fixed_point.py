"""Fixed-point iteration x <- rhs + J^T x."""

from __future__ import annotations

import torch
from torch import Tensor

from .clip import Clip
from .progress import Apply, Progress, Solution


def fixed_point(
    apply: Apply, rhs: Tensor, tol: float, max_vjp: int, clip: float | None = None
) -> Solution:
    """Solve (I - J^T) x = rhs by x <- rhs + J^T x, which converges only where rho(J) < 1.

    Source: Almeida 1987; Pineda 1987, "recurrent backpropagation". Costs one product per iteration.
    Memory holds two vectors per sample.

    Args:
        apply: x -> J^T x, on rows of shape (B, D).
        rhs: rows of norm one, or of zeros, shape (B, D).
        tol: the residual ||rhs - (I - J^T) x|| to reach in every sample.
        max_vjp: the largest number of products.
        clip: the largest length of J^T x, in multiples of ||rhs||; None for any length. With it x
            stays bounded whatever rho(J) is, and solves x = rhs + clip(J^T x). That is the system
            itself where the last J^T x was not clipped. The residual that is told is that of the
            system.

    Raises:
        NonFiniteError: if a product makes a NaN or an infinity in a sample that is being solved.
    """
    bound = None if clip is None else Clip(rhs, clip)
    progress = Progress(apply, rhs, tol, max_vjp, bound)
    x, residual = rhs, torch.empty_like(rhs)
    while not progress.exhausted:
        image = rhs + progress.apply(x)
        if progress.record(x, torch.sub(image, x, out=residual)):
            break
        x = progress.choose(image, x)
    return progress.solution()
