"""The generalised minimal residual method, restarted and batched."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._plumbing.late_read import LateRead, as_array
from .fixed_point import fixed_point
from .progress import Apply, Progress, Solution

_BLOCK = 10  # vectors whose memory is taken at first, and at most twice as many each time
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
    late, running = LateRead.is_late(rhs.device), None
    while progress.remaining > 1:
        if not late or progress.n_vjp:  # at first, to look there would be to wait
            running = as_array(progress.active)
        length = min(restart, progress.remaining - 1, rhs.shape[1])
        x = x + _cycle(progress, residual, length, running)
        residual = rhs - x + progress.apply(x)
        if progress.record(x, residual, at_once=True):
            break
    return progress.solution()


def _cycle(
    progress: Progress, residual: Tensor, length: int, running: NDArray[Any] | None
) -> Tensor:
    """Return the correction that minimises the residual over `length` Krylov vectors.

    Args:
        progress: of the solve.
        residual: at the beginning of the cycle, shape (B, D).
        length: the most vectors.
        running: the samples that are to be solved, shape (B,); None where the host does not know.
            The others are frozen: their basis vectors are zero.
    """
    if length < 1:  # of a state without numbers
        return torch.zeros_like(residual)
    basis, late = Basis(residual, length), LateRead(residual.device, as_array)
    problem = _LeastSquares(progress, length, running)
    norm = torch.linalg.vector_norm(residual, dim=1, keepdim=True)
    tiny = torch.finfo(residual.dtype).tiny
    last = basis.append(residual, norm.clamp(min=tiny), problem.frozen(residual))
    vector = torch.empty_like(residual)
    # A cycle can tell no more of the residual; the next one begins with the true one.
    least = norm.new_full((1, 1), progress.tol)
    for j in range(length):
        image = progress.apply(last)
        if j == _LONG and j < length - 1 and progress.tol > 0:
            least = progress.rounding(last, image).clamp(min=progress.tol).reshape(1, 1)
        torch.sub(last, image, out=vector)
        column, below, before = _orthogonalise(vector, basis, progress.tol, problem.running)
        numbers = [below, before, norm, least.expand_as(norm), *column]
        read = late.read(torch.cat(numbers, dim=1))
        if read is not None:
            problem.add(read)
        if not problem.running.any() or progress.remaining < 2:
            break
        if j + 1 < length:
            last = basis.append(vector, below, problem.frozen(residual))
    if (read := late.last()) is not None:
        problem.add(read)
    return basis.combination(problem.weights(residual))


class _LeastSquares:
    """The least-squares problem in the Hessenberg matrix H of each sample, on the host.

    It needs no rotations: the least residual is the part of its right-hand side along the u with
    u^T H = 0, which grows by one number a column, and H without its first row is triangular.

    Columns of a frozen sample are zero, with a one on the diagonal, so that the triangular solve at
    the end leaves its coefficients alone.

    Args:
        progress: of the solve.
        length: the most columns.
        running: the samples that are to be solved, shape (B,); None where the host does not know.

    Attributes:
        running: those that are not solved yet.
    """

    def __init__(self, progress: Progress, length: int, running: NDArray[Any] | None) -> None:
        batch = len(progress.rhs)
        self._progress, self._eps = progress, torch.finfo(progress.rhs.dtype).eps
        self._mask: Tensor | None = None
        if running is None:
            running, self._mask = np.ones(batch, dtype=bool), ~progress.active[:, None]
        self.running = running
        self._triangle = np.zeros((batch, length, length))
        self._u = np.zeros((batch, length + 1))
        self._u[:, 0] = 1
        self._square = np.ones(batch)  # |u|^2
        self._norm = np.zeros(batch)
        self._count = 0
        self._masked = batch

    def frozen(self, like: Tensor) -> Tensor | None:
        """Return the samples that do not run, shape (B, 1), on a tensor's device; None if all do.

        Args:
            like: the tensor.
        """
        running = int(np.count_nonzero(self.running))
        if running < self._masked:
            stopped = torch.from_numpy(~self.running[:, None])
            self._mask, self._masked = stopped.to(like.device, non_blocking=True), running
        return self._mask

    @np.errstate(all="ignore")
    def add(self, numbers: NDArray[Any]) -> None:
        """Take a column into account.

        Args:
            numbers: shape (B, 4 + n), or (B, 4 + 2 n): the column's last number, the norm before
                its vector was made orthogonal, that of the residual, the least that can be told of
                that, and the column above the diagonal, which may be a sum of two.

        Raises:
            NonFiniteError: if it is not finite in a sample that runs.
        """
        n = self._count = self._count + 1
        numbers = numbers.astype(float)
        below, before, norm, least = numbers[:, :4].T
        column = numbers[:, 4:]
        if column.shape[1] > n:
            column = column[:, :n] + column[:, n:]
        diagonal, counted = below, self.running & (norm > 0)
        if not counted.all():
            diagonal, column = np.where(counted, below, 1), np.where(counted[:, None], column, 0)
        if not np.isfinite(diagonal).all():
            self._progress.check_finite((~np.isfinite(diagonal)).tolist())
        products = column * self._u[:, :n]
        total = products.sum(axis=1)
        new = total / diagonal
        small = below <= 10 * self._eps * before
        if small.any():
            # Rounding over rounding: H is singular, and J has an eigenvalue of one.
            rounding = 1e3 * self._eps * np.abs(products).sum(axis=1)
            new = np.where(small & (np.abs(total) <= rounding), 0, new)
        self._triangle[:, : n - 1, n - 1], self._triangle[:, n - 1, n - 1] = column[:, 1:], diagonal
        self._u[:, n] = -new
        self._square = self._square + new * new
        self._norm, reduction = norm, np.sqrt(self._square)  # of the residual
        self.running = counted & (norm > least * reduction) & (reduction < 1 / self._eps)

    def weights(self, like: Tensor) -> Tensor:
        """Return what each basis vector weighs, shape (B, n), in a tensor's dtype and device."""
        n = self._count
        right = -(self._norm / self._square)[:, None] * self._u[:, 1 : n + 1]
        weights: Tensor = torch.linalg.solve_triangular(
            torch.from_numpy(self._triangle[:, :n, :n]),
            torch.from_numpy(right)[:, :, None],
            upper=True,
        )
        return weights.squeeze(2).to(like.device, like.dtype, non_blocking=True)


class Basis:
    """Orthonormal vectors of each sample, in blocks that are made as they are needed.

    Products with them are of row vectors from the left, which is several times faster than with
    column vectors.
    """

    def __init__(self, like: Tensor, most: int) -> None:
        self._like, self._left = like, most
        self._blocks: list[Tensor] = []
        self._room = 0  # in the last block

    def append(self, vectors: Tensor, norm: Tensor, frozen: Tensor | None) -> Tensor:
        """Add vectors, divided by their norms; return them.

        Args:
            vectors: shape (B, D).
            norm: shape (B, 1), above zero.
            frozen: the samples that have stopped, whose are zero, shape (B, 1); none if None.
        """
        if not self._room:
            batch, size = self._like.shape
            self._room = min(_BLOCK * 2 ** len(self._blocks), self._left)
            self._left -= self._room
            self._blocks.append(self._like.new_empty(batch, self._room, size))
        block = self._blocks[-1]
        place = block[:, block.shape[1] - self._room]
        self._room -= 1
        torch.div(vectors, norm, out=place)
        if frozen is not None:
            place.masked_fill_(frozen, 0)  # NaN times zero is NaN
        return place

    def subtract_projection(self, vector: Tensor) -> list[Tensor]:
        """Take from a vector its part in the basis, in place.

        Returns:
            The coefficients of each block, shape (B, n).
        """
        rows, used = vector[:, None], self._used()
        parts = [torch.bmm(rows, block.mT) for block in used]
        for part, block in zip(parts, used, strict=True):
            rows.baddbmm_(part, block, alpha=-1)
        return [part.squeeze(1) for part in parts]

    def combination(self, weights: Tensor) -> Tensor:
        """Return the sum of the vectors with these weights, shape (B, n), as many as there are."""
        total = torch.zeros_like(self._like)[:, None]
        sizes = [block.shape[1] for block in self._blocks]
        sizes[-1] = weights.shape[1] - sum(sizes[:-1])
        parts = weights[:, None].split(sizes, dim=2)
        for part, block in zip(parts, self._blocks, strict=True):
            total.baddbmm_(part, block[:, : part.shape[2]])
        return total.squeeze(1)

    def _used(self) -> list[Tensor]:
        last = self._blocks[-1]
        return [*self._blocks[:-1], last[:, : last.shape[1] - self._room]]


def _orthogonalise(
    vector: Tensor, basis: Basis, tol: float, running: NDArray[Any]
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Take from a vector its part in a basis.

    By classical Gram-Schmidt, whose two products read the basis once each. What rounding leaves in
    the basis grows by the factor that the vector shrinks by; where that would count against the
    tolerance, a second pass removes it.

    Args:
        vector: changed in place, shape (B, D).
        basis: of n vectors.
        tol: the tolerance.
        running: the samples that count, shape (B,).

    Returns:
        Parts that add up to the coefficients in the basis, shape (B, n) together, once or twice;
        the norm of what is left, at least that of the rounding; and the norm before, both of shape
        (B, 1).
    """
    info = torch.finfo(vector.dtype)
    before = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
    column = basis.subtract_projection(vector)
    # On other devices to look would be to wait, which takes longer than a second pass.
    late = LateRead.is_late(vector.device)
    if not late and info.eps < 0.01 * tol:
        below = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
        small = as_array(before) * info.eps >= 0.01 * tol * as_array(below)
        if not (running & small[:, 0]).any():
            return column, below.clamp(min=info.tiny), before
    column += basis.subtract_projection(vector)
    below = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
    if late or not (as_array(below) > as_array(before) * info.eps).all():
        below = torch.maximum(below, before * info.eps).clamp(min=info.tiny)
    return column, below, before
