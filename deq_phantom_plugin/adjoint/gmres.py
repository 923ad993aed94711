"""The generalised minimal residual method, restarted and batched."""

from __future__ import annotations

import torch
from torch import Tensor

from .fixed_point import fixed_point
from .progress import Apply, Progress, Solution


def gmres(apply: Apply, rhs: Tensor, tol: float, max_vjp: int, restart: int = 50) -> Solution:
    """Solve (I - J^T) x = rhs by restarted GMRES (Saad & Schultz 1986).

    Every sample has its own Krylov space and stops on its own. Takes one product an iteration
    and one for the true residual at each restart and at the end; keeps `restart` + 1 vectors. The
    true residual also tells when samples that were said to be independent are not.
    """
    if max_vjp < 3:  # too few for a Krylov vector and a true residual
        return fixed_point(apply, rhs, tol, max_vjp)
    progress = Progress(apply, rhs, tol, max_vjp)
    x, residual = torch.zeros_like(rhs), rhs
    while progress.remaining > 1:
        x = x + _cycle(progress, residual, min(restart, progress.remaining - 1, rhs.shape[1]))
        residual = rhs - x + progress.apply(x)
        if progress.record(x, residual):
            break
    return progress.solution()


def _cycle(progress: Progress, residual: Tensor, length: int) -> Tensor:
    """Return the correction that minimises the residual over `length` Krylov vectors.

    Solved samples are frozen: their new basis vectors and columns are zero, with a one on the
    diagonal, so the triangular solve at the end leaves their coefficients alone.
    """
    batch, size = residual.shape
    norm = torch.linalg.vector_norm(residual, dim=1)
    running = progress.active.clone()
    basis = residual.new_empty(batch, length + 1, size)  # written before read: few are needed
    basis[:, 0] = _unit(residual, norm) * running[:, None]
    triangle = residual.new_zeros(batch, length, length)
    cosines, sines = (residual.new_zeros(batch, length) for _ in range(2))
    target = residual.new_zeros(batch, length + 1)
    target[:, 0] = norm * running
    used = 0
    for j in range(length):
        vector = basis[:, j] - progress.apply(basis[:, j])
        # Gram-Schmidt twice: as stable as the modified one, in two products instead of j.
        column = residual.new_zeros(batch, j + 1)
        for _ in range(2):
            # Row vectors from the left, which is several times faster than column vectors.
            part = vector[:, None] @ basis[:, : j + 1].mT
            vector = vector - (part @ basis[:, : j + 1]).squeeze(1)
            column = column + part.squeeze(1)
        below = torch.linalg.vector_norm(vector, dim=1)
        finite = torch.isfinite(below) | ~running
        for i in range(j):
            upper = cosines[:, i] * column[:, i] + sines[:, i] * column[:, i + 1]
            column[:, i + 1] = cosines[:, i] * column[:, i + 1] - sines[:, i] * column[:, i]
            column[:, i] = upper
        diagonal = torch.hypot(column[:, j], below)
        regular = running & (diagonal > 0)
        cosines[:, j] = torch.where(regular, column[:, j] / diagonal, 1)
        sines[:, j] = torch.where(regular, below / diagonal, 0)
        triangle[:, : j + 1, j] = column * regular[:, None]
        triangle[:, j, j] = torch.where(regular, diagonal, 1)
        target[:, j + 1] = torch.where(regular, -sines[:, j] * target[:, j], 0)
        target[:, j] = torch.where(regular, cosines[:, j] * target[:, j], 0)
        used = j + 1
        running = regular & ~(target[:, j + 1].abs() <= progress.tol)
        basis[:, j + 1] = _unit(vector, below) * running[:, None]
        if not progress.go_on(running, finite):
            break
    weights: Tensor = torch.linalg.solve_triangular(
        triangle[:, :used, :used], target[:, :used, None], upper=True
    )
    return (weights.mT @ basis[:, :used]).squeeze(1)


def _unit(vectors: Tensor, norm: Tensor) -> Tensor:
    return torch.where((norm > 0)[:, None], vectors / norm[:, None], 0)
