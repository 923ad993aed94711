"""Anderson acceleration of the fixed-point iteration."""

from __future__ import annotations

import torch
from torch import Tensor

from .progress import Apply, Progress, Solution, choose


def anderson(apply: Apply, rhs: Tensor, tol: float, max_vjp: int, window: int = 8) -> Solution:
    """Solve (I - J^T) x = rhs by Anderson acceleration, type II (Walker & Ni 2011).

    Takes one product an iteration and keeps 2 `window` vectors; an iteration reads one half of them
    for a row of their Gram matrix and for inner products with the residual, the other to mix.
    """
    progress = Progress(apply, rhs, tol, max_vjp)
    batch, size = rhs.shape
    window = min(window, size, max_vjp)
    # Changes of the residual, of unit length so that the ridge weighs on directions and not on
    # sizes, and what the next iterate moves by for each.
    directions = rhs.new_zeros(batch, window, size)
    moves = rhs.new_zeros(batch, window, size)
    gram = rhs.new_zeros(batch, window, window)
    # Differences of residuals soon point the same way; without this their Gram matrix is singular.
    ridge = torch.finfo(rhs.dtype).eps * 10 * torch.eye(window, dtype=rhs.dtype, device=rhs.device)
    x, old_x, old_residual = rhs, rhs, rhs
    iteration = 0
    while not progress.exhausted:
        residual = rhs + progress.apply(x) - x
        if progress.record(x, residual):
            break
        update = residual
        if iteration > 0:
            slot = (iteration - 1) % window
            change = residual - old_residual
            length = torch.linalg.vector_norm(change, dim=1, keepdim=True)
            length = torch.where(length > 0, length, torch.ones_like(length))
            directions[:, slot] = change / length
            moves[:, slot] = (x - old_x + change) / length
            kept = min(iteration, window)
            held, row = directions[:, :kept], directions[:, slot : slot + 1]
            gram[:, slot, :kept] = gram[:, :kept, slot] = (row @ held.mT).squeeze(1)
            projected = (residual[:, None] @ held.mT).mT
            mix, _ = torch.linalg.solve_ex(gram[:, :kept, :kept] + ridge[:kept, :kept], projected)
            update = residual - (mix.mT @ moves[:, :kept]).squeeze(1)
        old_x, old_residual = x, residual
        x = choose(progress.active, x + update, x)
        iteration += 1
    return progress.solution()
