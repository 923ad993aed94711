"""The generalised minimal residual method, restarted and batched."""

from __future__ import annotations

import torch
from torch import Tensor

from ..late_read import LateRead
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
        if progress.record(x, residual, at_once=True):
            break
    return progress.solution()


def _cycle(progress: Progress, residual: Tensor, length: int) -> Tensor:
    """Return the correction that minimises the residual over `length` Krylov vectors.

    The least-squares problem in the Hessenberg matrix H needs no rotations: the least residual is
    the part of its right-hand side along the u with u^T H = 0, which grows by one number a column,
    and H without its first row is triangular.

    Solved samples are frozen: their new basis vectors and columns are zero, with a one on the
    diagonal, so the triangular solve at the end leaves their coefficients alone.
    """
    batch, size = residual.shape
    norm = torch.linalg.vector_norm(residual, dim=1)
    running = progress.active
    basis = residual.new_empty(batch, length + 1, size)  # written before read: few are needed
    _put_unit(basis[:, 0], residual, norm, running)
    vector = torch.empty_like(residual)
    triangle = residual.new_zeros(batch, length, length)
    u = residual.new_zeros(batch, length + 1)
    u[:, 0] = 1
    square = torch.ones_like(norm)  # |u|^2
    # A cycle can tell no more of the residual; the next one begins with the true one.
    eps = torch.finfo(residual.dtype).eps
    flags = LateRead(residual.device)
    used = 0
    for j in range(length):
        torch.sub(basis[:, j], progress.apply(basis[:, j]), out=vector)
        column, below, exhausted = _orthogonalise(vector, basis[:, : j + 1], progress, running)
        counted, used = running, j + 1
        triangle[:, :j, j], triangle[:, j, j] = column[:, 1:], torch.where(counted, below, 1)
        products = column * u[:, :used]
        new = products.sum(dim=1) / triangle[:, j, j]
        if exhausted is not None:
            # Rounding over rounding: H is singular, and J has an eigenvalue of one.
            singular = products.sum(dim=1).abs() <= 1e3 * eps * products.abs().sum(dim=1)
            new = torch.where(exhausted & singular, 0, new)
        u[:, used] = -new
        square = square + new * new
        reduction = square.sqrt()  # of the residual
        running = counted & (norm > progress.tol * reduction) & (reduction < 1 / eps)
        _put_unit(basis[:, used], vector, below, running)
        if not progress.go_on(running, below, counted, flags):
            break
    least = -(norm / square)[:, None] * u[:, 1 : used + 1]
    weights: Tensor = torch.linalg.solve_triangular(
        triangle[:, :used, :used], least[:, :, None], upper=True
    )
    return (weights.mT @ basis[:, :used]).squeeze(1)


def _orthogonalise(
    vector: Tensor, basis: Tensor, progress: Progress, running: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Take from a vector its part in a basis.

    By classical Gram-Schmidt, whose two products read the basis once each. What rounding leaves in
    the basis grows by the factor that the vector shrinks by; where that would count against the
    tolerance, a second pass removes it.

    Args:
        vector: changed in place, shape (B, D).
        basis: shape (B, n, D).
        progress: of the solve.
        running: the samples that count, shape (B,).

    Returns:
        The coefficients in the basis; the norm of what is left, at least that of the rounding; and
        in which samples nothing but rounding is left, None if surely in none.
    """
    info = torch.finfo(vector.dtype)
    rounding = torch.linalg.vector_norm(vector, dim=1) * info.eps
    column = _subtract_projection(vector, basis)
    below = torch.linalg.vector_norm(vector, dim=1)
    # On other devices to look would be to wait, which takes longer than a second pass.
    look = vector.device.type == "cpu"
    if look and not bool((running & (rounding >= 0.01 * progress.tol * below)).any()):
        return column, below, None
    column = column + _subtract_projection(vector, basis)
    below = torch.linalg.vector_norm(vector, dim=1)
    exhausted = below <= 10 * rounding
    return column, torch.maximum(below, rounding.clamp(min=info.tiny)), exhausted


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
