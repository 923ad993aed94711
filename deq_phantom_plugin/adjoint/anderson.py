"""Anderson acceleration of the fixed-point iteration."""

from __future__ import annotations

import torch
from torch import Tensor

from .progress import Apply, Progress, Solution


def anderson(apply: Apply, rhs: Tensor, tol: float, max_vjp: int, window: int = 8) -> Solution:
    """Solve (I - J^T) x = rhs by Anderson acceleration, type II.

    Source: Walker & Ni 2011, "Anderson acceleration for fixed-point iterations". Costs one product
    per iteration. Memory holds 2 `window` vectors per sample. An iteration reads one half of them
    for inner products, and the other half to make the next iterate.

    Args:
        apply: x -> J^T x, on rows of shape (B, D).
        rhs: rows of norm one, or of zeros, shape (B, D).
        tol: the residual ||rhs - (I - J^T) x|| to reach in every sample.
        max_vjp: the largest number of products.
        window: the largest number of past iterations that are combined.

    Raises:
        NonFiniteError: if a product makes a NaN or an infinity in a sample that is being solved.
    """
    progress = Progress(apply, rhs, tol, max_vjp)
    batch, size = rhs.shape
    window = min(window, size, max_vjp)
    # `directions`: the changes of the residual, shape (B, window, D). They have unit length, so
    # that the ridge below weighs directions alike. `moves`: the move of the next iterate for each.
    kept = rhs.new_zeros(2, batch, window, size)
    directions, moves = kept
    gram = rhs.new_zeros(batch, window, window)
    # The changes soon point the same way. Without a ridge their Gram matrix is then singular.
    finfo = torch.finfo(rhs.dtype)
    ridge = finfo.eps * 10 * torch.eye(window, dtype=rhs.dtype, device=rhs.device)
    x = old_residual = update = rhs
    iteration = 0
    while not progress.exhausted:
        residual = (rhs + progress.apply(x)).sub_(x)
        if progress.record(x, residual):
            break
        if iteration > 0:
            slot, n = (iteration - 1) % window, min(iteration, window)
            newest = kept[:, :, slot]
            change, move = newest
            torch.sub(residual, old_residual, out=change)
            torch.add(update, change, out=move)
            length = torch.linalg.vector_norm(change, dim=1, keepdim=True)
            newest.div_(length.clamp(min=finfo.tiny))
            held, row = directions[:, :n], directions[:, slot : slot + 1]
            products = torch.baddbmm(ridge[slot, :n].expand(batch, 1, n), row, held.mT)
            gram[:, slot : slot + 1, :n] = products
            gram[:, :n, slot : slot + 1] = products.mT
            mix, _ = torch.linalg.solve_ex(gram[:, :n, :n], torch.bmm(held, residual[..., None]))
            update = torch.baddbmm(residual[:, None], mix.mT, moves[:, :n], alpha=-1).squeeze(1)
        else:
            update = residual
        old_residual = residual
        x = progress.choose(x + update, x)
        iteration += 1
    return progress.solution()
