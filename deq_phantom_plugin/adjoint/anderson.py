"""Anderson acceleration of the fixed-point iteration."""

from __future__ import annotations

import torch
from torch import Tensor

from .progress import Apply, Progress, Solution


def anderson(apply: Apply, rhs: Tensor, tol: float, max_vjp: int, window: int = 8) -> Solution:
    """Solve (I - J^T) x = rhs by Anderson acceleration, type II (Walker & Ni 2011).

    Takes one product an iteration and keeps 2 `window` vectors.
    """
    progress = Progress(apply, rhs, tol, max_vjp)
    batch, size = rhs.shape
    window = min(window, size, max_vjp)
    steps = rhs.new_zeros(batch, window, size)
    changes = rhs.new_zeros(batch, window, size)
    # Differences of residuals soon point the same way; without this their Gram matrix is singular.
    ridge = torch.finfo(rhs.dtype).eps * 10 * torch.eye(window, dtype=rhs.dtype, device=rhs.device)
    x, old_x, old_residual = rhs, rhs, rhs
    iteration = 0
    while not progress.exhausted:
        residual = rhs + progress.apply(x) - x
        if progress.record(x, residual):
            break
        if iteration > 0:
            slot = (iteration - 1) % window
            steps[:, slot], changes[:, slot] = x - old_x, residual - old_residual
        old_x, old_residual = x, residual
        # Scaled to unit length, so that the ridge weighs on directions and not on sizes.
        length = torch.linalg.vector_norm(changes, dim=2, keepdim=True)
        length = torch.where(length > 0, length, torch.ones_like(length))
        unit_changes = changes / length
        gram = unit_changes @ unit_changes.mT + ridge
        projected = unit_changes @ residual[:, :, None]
        mix = torch.linalg.solve(gram, projected)
        update = residual - ((steps / length + unit_changes).mT @ mix).squeeze(2)
        x = torch.where(progress.active[:, None], x + update, x)
        iteration += 1
    return progress.solution()
