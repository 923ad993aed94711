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
    _put_unit(basis[:, 0], residual, norm, running)
    vector = torch.empty_like(residual)
    triangle = residual.new_zeros(batch, length, length)
    # The rotations so far, as one matrix: a product with it stands for a loop over them.
    rotation = torch.eye(length + 1, dtype=residual.dtype, device=residual.device)
    rotation = rotation.repeat(batch, 1, 1)
    target = residual.new_zeros(batch, length + 1)
    target[:, 0] = norm * running
    used = 0
    for j in range(length):
        torch.sub(basis[:, j], progress.apply(basis[:, j]), out=vector)
        column, below = _orthogonalise(vector, basis[:, : j + 1], progress, running)
        finite = torch.isfinite(below) | ~running
        column = (rotation[:, : j + 1, : j + 1] @ column[:, :, None]).squeeze(2)
        diagonal = torch.hypot(column[:, j], below)
        regular = running & (diagonal > 0)
        cosine = torch.where(regular, column[:, j] / diagonal, 1)
        sine = torch.where(regular, below / diagonal, 0)
        triangle[:, : j + 1, j] = column * regular[:, None]
        triangle[:, j, j] = torch.where(regular, diagonal, 1)
        row = rotation[:, j].clone()
        rotation[:, j], rotation[:, j + 1] = cosine[:, None] * row, -sine[:, None] * row
        rotation[:, j, j + 1], rotation[:, j + 1, j + 1] = sine, cosine
        target[:, j + 1] = torch.where(regular, -sine * target[:, j], 0)
        target[:, j] = torch.where(regular, cosine * target[:, j], 0)
        used = j + 1
        running = regular & ~(target[:, j + 1].abs() <= progress.tol)
        _put_unit(basis[:, j + 1], vector, below, running)
        if not progress.go_on(running, finite):
            break
    weights: Tensor = torch.linalg.solve_triangular(
        triangle[:, :used, :used], target[:, :used, None], upper=True
    )
    return (weights.mT @ basis[:, :used]).squeeze(1)


def _orthogonalise(
    vector: Tensor, basis: Tensor, progress: Progress, running: Tensor
) -> tuple[Tensor, Tensor]:
    """Take from a vector its part in a basis; return the coefficients there, and what is left.

    By classical Gram-Schmidt, whose two products read the basis once each. What rounding leaves in
    the basis grows by the factor that the vector shrinks by; where that would count against the
    tolerance, a second pass removes it.

    Args:
        vector: changed in place, shape (B, D).
        basis: shape (B, n, D).
        progress: of the solve.
        running: the samples that count, shape (B,).
    """
    before = torch.linalg.vector_norm(vector, dim=1)
    column = _subtract_projection(vector, basis)
    below = torch.linalg.vector_norm(vector, dim=1)
    error = torch.finfo(vector.dtype).eps * before / below
    # On other devices to look would be to wait, which takes longer than a second pass.
    if vector.device.type != "cpu" or bool((running & (error > 0.01 * progress.tol)).any()):
        column = column + _subtract_projection(vector, basis)
        below = torch.linalg.vector_norm(vector, dim=1)
    return column, below


def _subtract_projection(vector: Tensor, basis: Tensor) -> Tensor:
    # Row vectors from the left, which is several times faster than column vectors.
    part = vector[:, None] @ basis.mT
    vector[:, None].baddbmm_(part, basis, alpha=-1)
    return part.squeeze(1)


def _put_unit(place: Tensor, vectors: Tensor, norm: Tensor, running: Tensor) -> None:
    """Write vectors of norm one, zero where a sample has stopped."""
    kept = running & (norm > 0)
    torch.mul(vectors, torch.where(kept, 1 / torch.where(kept, norm, 1), 0)[:, None], out=place)
    if place.device.type != "cpu" or not bool(kept.all()):
        place.masked_fill_(~kept[:, None], 0)  # infinity times zero is NaN
