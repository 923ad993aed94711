"""The generalised minimal residual method, restarted and batched."""

from __future__ import annotations

import torch
from torch import Tensor

from .._plumbing.late_read import LateRead
from .fixed_point import fixed_point
from .progress import Apply, Progress, Solution

_BLOCK = 10  # vectors whose memory is taken at once
_LONG = 10  # products after which a cycle asks how far F's own rounding lets it get


def gmres(apply: Apply, rhs: Tensor, tol: float, max_vjp: int, restart: int = 50) -> Solution:
    """Solve (I - J^T) x = rhs by restarted GMRES (Saad & Schultz 1986).

    Every sample has its own Krylov space and stops on its own. Takes one product an iteration
    and one for the true residual at each restart and at the end; keeps one vector an iteration, at
    most `restart`. The true residual also tells when samples that were said to be independent are
    not. What a cycle carries along knows nothing of the rounding of products; solves of more than
    ten measure that with one.
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
    batch = len(residual)
    norm = torch.linalg.vector_norm(residual, dim=1)
    running = progress.active
    basis = _Basis(residual)
    last = basis.append(residual, norm, running)
    vector = torch.empty_like(residual)
    triangle = residual.new_zeros(batch, length, length)
    u = residual.new_zeros(batch, length + 1)
    u[:, 0] = 1
    square = torch.ones_like(norm)  # |u|^2
    # A cycle can tell no more of the residual; the next one begins with the true one.
    eps = torch.finfo(residual.dtype).eps
    flags = LateRead(residual.device)
    used, least = 0, norm.new_tensor(progress.tol)
    for j in range(length):
        image = progress.apply(last)
        if j == _LONG and j < length - 1 and progress.tol > 0:
            least = progress.rounding(last, image).clamp(min=progress.tol)
        torch.sub(last, image, out=vector)
        column, below, exhausted = _orthogonalise(vector, basis, progress, running)
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
        running = counted & (norm > least * reduction) & (reduction < 1 / eps)
        if not progress.go_on(running, below, counted, flags) or progress.remaining < 2:
            break
        if used < length:
            last = basis.append(vector, below, running)
    least = -(norm / square)[:, None] * u[:, 1 : used + 1]
    weights: Tensor = torch.linalg.solve_triangular(
        triangle[:, :used, :used], least[:, :, None], upper=True
    )
    return basis.combination(weights.squeeze(2))


class _Basis:
    """Orthonormal vectors of each sample, in blocks that are made as they are needed.

    Products with them are of row vectors from the left, which is several times faster than with
    column vectors.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._blocks: list[Tensor] = []
        self._count = 0

    def append(self, vectors: Tensor, norm: Tensor, running: Tensor) -> Tensor:
        """Add vectors, divided by their norms; return them, zero where a sample has stopped."""
        block, slot = divmod(self._count, _BLOCK)
        if block == len(self._blocks):
            batch, size = self._like.shape
            self._blocks.append(self._like.new_empty(batch, _BLOCK, size))
        place = self._blocks[block][:, slot]
        self._count += 1
        kept = running & (norm > 0)
        scale = torch.where(kept, 1 / torch.where(kept, norm, 1), 0)
        torch.mul(vectors, scale[:, None], out=place)
        if place.device.type != "cpu" or not bool(kept.all()):
            place.masked_fill_(~kept[:, None], 0)  # infinity times zero is NaN
        return place

    def subtract_projection(self, vector: Tensor) -> Tensor:
        """Take from a vector its part in the basis, in place; return the coefficients."""
        rows = vector[:, None]
        parts = [rows @ block.mT for block in self._used()]
        for part, block in zip(parts, self._used(), strict=True):
            rows.baddbmm_(part, block, alpha=-1)
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)).squeeze(1)

    def combination(self, weights: Tensor) -> Tensor:
        """Return the sum of the vectors with these weights, shape (B, n), as many as there are."""
        total = torch.zeros_like(self._like)[:, None]
        for part, block in zip(weights[:, None].split(_BLOCK, dim=2), self._blocks, strict=True):
            total.baddbmm_(part, block[:, : part.shape[2]])
        return total.squeeze(1)

    def _used(self) -> list[Tensor]:
        last = (self._count - 1) % _BLOCK + 1
        return [*self._blocks[:-1], self._blocks[-1][:, :last]]


def _orthogonalise(
    vector: Tensor, basis: _Basis, progress: Progress, running: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Take from a vector its part in a basis.

    By classical Gram-Schmidt, whose two products read the basis once each. What rounding leaves in
    the basis grows by the factor that the vector shrinks by; where that would count against the
    tolerance, a second pass removes it.

    Args:
        vector: changed in place, shape (B, D).
        basis: of n vectors.
        progress: of the solve.
        running: the samples that count, shape (B,).

    Returns:
        The coefficients in the basis, shape (B, n); the norm of what is left, at least that of the
        rounding; and in which samples nothing but rounding is left, None if surely in none.
    """
    info = torch.finfo(vector.dtype)
    rounding = torch.linalg.vector_norm(vector, dim=1) * info.eps
    column = basis.subtract_projection(vector)
    below = torch.linalg.vector_norm(vector, dim=1)
    # On other devices to look would be to wait, which takes longer than a second pass.
    look = vector.device.type == "cpu"
    if look and not bool((running & (rounding >= 0.01 * progress.tol * below)).any()):
        return column, below, None
    column = column + basis.subtract_projection(vector)
    below = torch.linalg.vector_norm(vector, dim=1)
    exhausted = below <= 10 * rounding
    return column, torch.maximum(below, rounding.clamp(min=info.tiny)), exhausted
