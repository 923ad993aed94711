"""Broyden's method on the linear system."""

from __future__ import annotations

import torch
from torch import Tensor

from .progress import Apply, Progress, Solution


def broyden(apply: Apply, rhs: Tensor, tol: float, max_vjp: int) -> Solution:
    """Solve (I - J^T) x = rhs by Broyden's first method (Broyden 1965).

    Takes one product an iteration and keeps two vectors for each. The inverse Jacobian of
    r(x) = rhs + J^T x - x is held as -I + sum_i u_i v_i^T.
    """
    progress = Progress(apply, rhs, tol, max_vjp)
    batch, size = rhs.shape
    us, vs = (rhs.new_zeros(batch, max_vjp, size) for _ in range(2))
    tiny = torch.finfo(rhs.dtype).tiny

    def inverse(y: Tensor, left: Tensor, right: Tensor) -> Tensor:
        # Row vectors from the left: the same products as column vectors take five times as long.
        return ((y[:, None] @ right.mT) @ left).squeeze(1) - y

    x = rhs
    residual = rhs + progress.apply(x) - x
    done = progress.record(x, residual)
    rank = 0
    while not done and not progress.exhausted:
        step = -inverse(residual, us[:, :rank], vs[:, :rank]) * progress.active[:, None]
        x = x + step
        old, residual = residual, rhs + progress.apply(x) - x
        done = progress.record(x, residual)
        change = residual - old
        v = inverse(step, vs[:, :rank], us[:, :rank])
        denominator = (v * change).sum(dim=1, keepdim=True)
        usable = denominator.abs() > tiny
        u = step - inverse(change, us[:, :rank], vs[:, :rank])
        us[:, rank] = torch.where(usable, u / torch.where(usable, denominator, 1), 0)
        vs[:, rank] = v
        rank += 1
    return progress.solution()
