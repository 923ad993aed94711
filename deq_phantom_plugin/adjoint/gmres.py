"""The generalised minimal residual method (GMRES), restarted and batched.

What is solved, for each of B samples: A x = b with A = I - J^T, where x and b have D elements.
A cycle begins at an x, with the residual r = b - A x of norm beta. It looks for the correction in
the Krylov space of r that leaves the least residual. Shapes are those of one sample.

1. The basis (`_cycle`, `_orthogonalise`). q_0 = r / beta. Each A q_j = q_j - J^T q_j is made
   orthogonal to q_0 ... q_j by Gram-Schmidt, and its rest, normalised, is q_(j+1):

       A q_j = h_0j q_0 + ... + h_jj q_j + h_(j+1)j q_(j+1).

   For n products that is A Q = Q' H. Q has n columns q_j, shape (D, n); Q' has one more, shape
   (D, n + 1); H is zero below its first subdiagonal, shape (n + 1, n).

2. The small problem. The correction is Q y, y of shape (n,). It leaves the residual
   r - A Q y = Q' (beta e_0 - H y), whose norm is |beta e_0 - H y|, since Q' is orthonormal.

3. The least residual (`_LeastSquares.add`). The n columns of H leave one direction u of shape
   (n + 1,) with u^T H = 0. Let u_0 = 1. What remains of beta e_0 is its part along u:

       beta e_0 - H y = beta u / |u|^2,   of norm beta / |u|.

   Column n - 1 of u^T H = 0 says what the next element is, so u needs no rotations:

       u_n = -(h_0(n-1) u_0 + ... + h_(n-1)(n-1) u_(n-1)) / h_n(n-1).

4. The weights (`_LeastSquares.weights`). H without its first row is an upper triangular R, shape
   (n, n). The same rows of step 3 read R y = -beta (u_1, ..., u_n) / |u|^2.

Step 1 runs on the device. Steps 2 to 4 are of a few numbers per sample, and run on the host.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._plumbing.late_read import LateRead, as_array
from .fixed_point import fixed_point
from .progress import Apply, Progress, Solution

_BLOCK = 10  # vectors in the first block of memory; each further block has at most twice as many
_LONG = 10  # products after which a cycle asks how far F's own rounding lets it get


def gmres(apply: Apply, rhs: Tensor, tol: float, max_vjp: int, restart: int = 50) -> Solution:
    """Solve (I - J^T) x = rhs by restarted GMRES.

    Source: Saad & Schultz 1986, "GMRES: A generalized minimal residual algorithm for solving
    nonsymmetric linear systems". Every sample has its own Krylov space, and stops on its own.

    Costs one product per iteration, and one for the true residual at each restart and at the end.
    The true residual also shows where samples that were said to be independent are not. A cycle's
    own estimate of the residual knows nothing of the rounding of products: a cycle of more than
    ten products measures the rounding, with one product more.

    Args:
        apply: x -> J^T x, on rows of shape (B, D).
        rhs: rows of norm one, or of zeros, shape (B, D).
        tol: the residual ||rhs - (I - J^T) x|| to reach in every sample.
        max_vjp: the largest number of products.
        restart: the largest number of vectors per sample that are kept.

    Raises:
        NonFiniteError: if a product makes a NaN or an infinity in a sample that is being solved.
    """
    if max_vjp < 3:  # too few for a Krylov vector and a true residual
        return fixed_point(apply, rhs, tol, max_vjp)
    progress = Progress(apply, rhs, tol, max_vjp)
    x, residual = torch.zeros_like(rhs), rhs
    late, running = LateRead.is_late(rhs.device), None
    while progress.remaining > 1:
        if not late or progress.n_vjp:  # the first look at a device would only be a wait
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
    """Return the correction that minimises the residual over `length` Krylov vectors: (B, D).

    Args:
        progress: the state of the solve.
        residual: the residual at the beginning of the cycle, shape (B, D).
        length: the largest number of vectors.
        running: the samples that are to be solved, shape (B,); None where the host does not know.
            The others are frozen: their basis vectors are zero.
    """
    if length < 1:  # the state has no elements
        return torch.zeros_like(residual)
    basis, late = Basis(residual, length), LateRead(residual.device, as_array)
    problem = _LeastSquares(progress, length, running)
    norm = torch.linalg.vector_norm(residual, dim=1, keepdim=True)
    tiny = torch.finfo(residual.dtype).tiny
    last = basis.append(residual, norm.clamp(min=tiny), problem.frozen(residual))
    vector = torch.empty_like(residual)
    # Where the cycle's estimate of the residual is below this, it says no more. The next cycle
    # begins with the true residual.
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
    """Steps 2 to 4 of the module's text: the small problem of each sample, on the host.

    Columns of a frozen sample are zero, with a one on the diagonal. So the triangular solve at the
    end leaves its coefficients alone.

    Args:
        progress: the state of the solve.
        length: the largest number of columns.
        running: the samples that are to be solved, shape (B,); None where the host does not know.

    Attributes:
        running: the samples that are not solved yet, shape (B,).
    """

    def __init__(self, progress: Progress, length: int, running: NDArray[Any] | None) -> None:
        batch = len(progress.rhs)
        self._progress, self._eps = progress, torch.finfo(progress.rhs.dtype).eps
        self._mask: Tensor | None = None
        if running is None:
            running, self._mask = np.ones(batch, dtype=bool), ~progress.active[:, None]
        self.running = running
        self._triangle = np.zeros((batch, length, length))  # R
        self._u = np.zeros((batch, length + 1))
        self._u[:, 0] = 1
        self._square = np.ones(batch)  # |u|^2
        self._norm = np.zeros(batch)  # beta
        self._count = 0
        self._masked = batch

    def frozen(self, like: Tensor) -> Tensor | None:
        """Return the samples that do not run, shape (B, 1); None if all run.

        Args:
            like: a tensor on the device where the answer is needed.
        """
        running = int(np.count_nonzero(self.running))
        if running < self._masked:
            stopped = torch.from_numpy(~self.running[:, None])
            self._mask, self._masked = stopped.to(like.device, non_blocking=True), running
        return self._mask

    @np.errstate(all="ignore")
    def add(self, numbers: NDArray[Any]) -> None:
        """Add column n - 1 of H, step 3.

        Args:
            numbers: shape (B, 4 + n) or (B, 4 + 2 n). In this order: h_n(n-1); the norm of the
                product before it was made orthogonal; beta; the residual below which the estimate
                says no more; and h_0(n-1) ... h_(n-1)(n-1), which may be two parts to be added.

        Raises:
            NonFiniteError: if the column is not finite in a sample that runs.
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
            # u_n would be rounding divided by rounding: H is singular, J has an eigenvalue of 1.
            rounding = 1e3 * self._eps * np.abs(products).sum(axis=1)
            new = np.where(small & (np.abs(total) <= rounding), 0, new)
        self._triangle[:, : n - 1, n - 1], self._triangle[:, n - 1, n - 1] = column[:, 1:], diagonal
        self._u[:, n] = -new
        self._square = self._square + new * new
        self._norm, reduction = norm, np.sqrt(self._square)  # the residual is norm / reduction
        self.running = counted & (norm > least * reduction) & (reduction < 1 / self._eps)

    def weights(self, like: Tensor) -> Tensor:
        """Return y, step 4, shape (B, n), in the dtype and on the device of a tensor."""
        n = self._count
        right = -(self._norm / self._square)[:, None] * self._u[:, 1 : n + 1]
        weights: Tensor = torch.linalg.solve_triangular(
            torch.from_numpy(self._triangle[:, :n, :n]),
            torch.from_numpy(right)[:, :, None],
            upper=True,
        )
        return weights.squeeze(2).to(like.device, like.dtype, non_blocking=True)


class Basis:
    """The vectors q_j of each sample, orthonormal, as rows of blocks of shape (B, n, D).

    Blocks are made as they are needed. Products multiply the blocks by row vectors from the left,
    which is several times faster than by column vectors from the right.

    Args:
        like: a tensor of the shape, dtype and device of the vectors, (B, D).
        most: the largest number of vectors.
    """

    def __init__(self, like: Tensor, most: int) -> None:
        self._like, self._left = like, most
        self._blocks: list[Tensor] = []
        self._room = 0  # in the last block

    def append(self, vectors: Tensor, norm: Tensor, frozen: Tensor | None) -> Tensor:
        """Add one vector per sample, divided by its norm; return these vectors, shape (B, D).

        Args:
            vectors: shape (B, D).
            norm: their norms, shape (B, 1), above zero.
            frozen: the samples that have stopped, shape (B, 1), which get a vector of zeros; None
                if no sample has stopped.
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
            place.masked_fill_(frozen, 0)  # not a product with zero: NaN times zero is NaN
        return place

    def subtract_projection(self, vector: Tensor) -> list[Tensor]:
        """Subtract from a vector its part in the basis, in place.

        Args:
            vector: one per sample, shape (B, D).

        Returns:
            The coefficients in each block, a tensor of shape (B, n) per block.
        """
        rows, used = vector[:, None], self._used()
        parts = [torch.bmm(rows, block.mT) for block in used]
        for part, block in zip(parts, used, strict=True):
            rows.baddbmm_(part, block, alpha=-1)
        return [part.squeeze(1) for part in parts]

    def combination(self, weights: Tensor) -> Tensor:
        """Return Q y, the sum of the vectors with the weights y of shape (B, n): (B, D)."""
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
    """Subtract from a vector its part in the basis, step 1.

    Classical Gram-Schmidt takes two products, which read the basis once each. Its rounding leaves a
    part of about eps |before| in the basis, while the vector shrinks to |below|. Where that share,
    eps |before| / |below|, would count against the tolerance, a second pass removes it.

    Args:
        vector: one per sample, changed in place, shape (B, D).
        basis: q_0 ... q_(n-1).
        tol: the tolerance of the solve.
        running: the samples that count, shape (B,).

    Returns:
        The coefficients, of shape (B, n) after one pass, or two such parts to be added after two;
        the norm of what is left, at least that of its rounding, shape (B, 1); and the norm before,
        shape (B, 1).
    """
    info = torch.finfo(vector.dtype)
    before = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
    column = basis.subtract_projection(vector)
    # Another device than the CPU would have to be waited for, longer than a second pass takes.
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
