"""Broyden's estimate of an inverse Jacobian, kept as the steps that it took."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .._plumbing.late_read import LateRead, as_array

Product = Callable[[Tensor], Tensor]

# An update whose denominator is smaller than this, relative to |s|^2, would be a division by zero,
# or overflow float32 within some hundred steps of ill-conditioned problems.
_SMALLEST = 1e-5


class InverseEstimate:
    """H, an estimate of (J - I)^-1 for each sample, from the steps of Broyden's first method.

    With full steps s_n = -H_n r(x_n) of r(x) = F(x) - x, Broyden's update of H_n is a product,

        H_n = (I + s_n s_{n-1}^T / |s_{n-1}|^2) ... (I + s_1 s_0^T / |s_0|^2) H_0

    (Kelley 1995, "Iterative Methods for Linear and Nonlinear Equations", section 7.3), so that one
    vector an iteration is kept where the two factors of a sum of outer products would be two, and a
    product with H reads them twice: once for inner products and once for their combination, whose
    coefficients solve a small triangular system. A row of that system comes out of the same pass.
    (From a recurrence it could be had without, but not in float32.)

    Args:
        rows: the shape, dtype and device of r, a (B, D) matrix.
        capacity: the most steps.
        initial: x -> -H_0 x on (B, D) matrices; x itself if None.
    """

    def __init__(self, rows: Tensor, capacity: int, initial: Product | None = None) -> None:
        batch, size = rows.shape
        self._initial = initial
        self._steps = rows.new_empty(capacity, batch, size)  # written before read
        # |s_i|^2 on the diagonal, -s_i . s_{j+1} below it; what is above is never looked at.
        self._system = rows.new_zeros(batch, capacity, capacity)
        # Operations on tensors of no dimension take less than on Python's numbers.
        self._one, self._smallest = rows.new_tensor(1.0), rows.new_tensor(_SMALLEST)
        self._tiny = torch.finfo(rows.dtype).tiny
        self._late = LateRead.is_late(rows.device)  # where to look would be to wait
        self._count = 0

    @property
    def is_full(self) -> bool:
        """Whether no step can be kept any more."""
        return self._count == len(self._steps)

    def forget(self) -> None:
        """Begin anew with H_0."""
        self._count = 0

    def select(self, rows: Tensor) -> None:
        """Keep the samples of these indices only, with what `room` holds for them."""
        capacity, _, size = self._steps.shape
        steps, used = self._steps.new_empty(capacity, len(rows), size), slice(self._count + 1)
        torch.index_select(self._steps[used], 1, rows, out=steps[used])
        self._steps, self._system = steps, self._system[rows]

    def trim(self) -> None:
        """Leave out steps that are not finite, and give back the memory of those not taken.

        Where residuals are looked at late, or rarely, samples go on for a while after a NaN.
        """
        used = self._steps[: self._count]
        broken = ~used.isfinite().all(dim=2, keepdim=True)
        used.masked_fill_(broken, 0)
        most = torch.finfo(used.dtype).max
        squares = self._system.diagonal(dim1=1, dim2=2).nan_to_num(nan=most, posinf=most)
        self._system = self._system.nan_to_num(nan=0, posinf=0, neginf=0)
        self._system.diagonal(dim1=1, dim2=2).copy_(squares)
        if 2 * self._count < len(self._steps):
            self._steps = self._steps[: self._count].clone()

    @property
    def room(self) -> Tensor:
        """Where to write r at the current point before `step`, shape (B, D)."""
        return self._steps[self._count]

    def step(self, active: Tensor | None = None) -> Tensor:
        """Return the next step -H r, with H updated by the last one; zero where not active.

        Args:
            active: the samples that still move, shape (B,); all if None.
        """
        n, step = self._count, self.room
        if self._initial is not None:
            step.copy_(self._initial(step))
        if n > 0:
            # w = -H_{n-1} r = r + sum_{j<n-1} c_j s_{j+1}, c_j |s_j|^2 = s_j . r + sum_{i<j} ...
            coefficients = self._coefficients(n)
            mixed = row = step[:, None]
            if n > 1:
                mixed = torch.baddbmm(row, _row(coefficients, 0, n - 1), self._kept(1, n - 1))
            # The update gives -H_n r = w / (1 - s . w / |s|^2), whose denominator is
            # s^T H y / |s|^2, since H y = s - w. If it is none, w stands for both.
            change = torch.sub(self._one, _row(coefficients, n - 1, 1))
            if self._late or _smallest(change) <= _SMALLEST:
                change = torch.where(torch.gt(change.abs(), self._smallest), change, self._one)
            torch.div(mixed, change, out=row)
        if active is not None:
            step.masked_fill_(~active[:, None], 0)  # NaN times zero is NaN
        self._count = n + 1
        return step

    def _coefficients(self, n: int) -> Tensor:
        """Return c_j = (s_j . r + sum_{i<j} (s_j . s_{i+1}) c_i) / |s_j|^2 for j < n, (B, 1, n).

        The row of the last step is made here.
        """
        # Row vectors from the left: column vectors from the right take several times as long.
        products = torch.bmm(self._kept(n - 1, 2), self._kept(0, n, transposed=True))
        if n > 1:
            torch.neg(_row(products, 1, n - 1), out=self._part(n - 1, 0, 1, n - 1))
        # Of a step of zero all products are zero: there is nothing to divide.
        square = _row(products, n - 1, 1)
        torch.clamp(square, min=self._tiny, out=self._part(n - 1, n - 1, 1, 1))
        return _solve(self._part(0, 0, n, n, transposed=True), _row(products, n, n), upper=True)

    # What follows is one view where slices would be two or three, which take as long as the work
    # where states are small.

    def _kept(self, first: int, n: int, transposed: bool = False) -> Tensor:
        """Return n of the steps, shape (B, n, D)."""
        _, batch, size = self._steps.shape
        shape, strides = (batch, n, size), (size, batch * size, 1)
        if transposed:
            shape, strides = (batch, size, n), (size, 1, batch * size)
        return self._steps.as_strided(shape, strides, first * batch * size)

    def _part(
        self, row: int, column: int, height: int, width: int, transposed: bool = False
    ) -> Tensor:
        """Return a part of the system, shape (B, height, width)."""
        batch, size, _ = self._system.shape
        shape, strides = (batch, height, width), (size * size, size, 1)
        if transposed:
            shape, strides = (batch, width, height), (size * size, 1, size)
        return self._system.as_strided(shape, strides, row * size + column)

    def transposed(self, vectors: Tensor) -> Tensor:
        """Return -H^T x for the last H, shape (B, D): an estimate of (I - J^T)^-1 x.

        For H_0 = -I.
        """
        n = self._count - 1
        if n < 1:
            return vectors
        # x + sum_{j<n} c_j s_j, c_j |s_j|^2 = s_{j+1} . x + sum_{i>j} (s_{j+1} . s_i) c_i
        steps = self._kept(0, n + 1)
        inner = torch.bmm(vectors[:, None], steps[:, 1:].mT)
        coefficients = _solve(self._part(0, 0, n, n), inner, upper=False)
        return torch.baddbmm(vectors[:, None], coefficients, steps[:, :n]).squeeze(1)


def _smallest(numbers: Tensor) -> float:
    """Return the smallest absolute value of (B, 1, 1) numbers, zero if one is NaN."""
    if len(numbers) == 1:
        number = abs(numbers.tolist()[0][0][0])
        return number if number == number else 0.0
    return float(np.nan_to_num(np.abs(as_array(numbers)).min(initial=np.inf), posinf=np.inf))


def _row(matrices: Tensor, first: int, n: int) -> Tensor:
    """Return n numbers of each of contiguous matrices, shape (B, 1, n)."""
    batch, height, width = matrices.shape
    size = height * width
    return matrices.as_strided((batch, 1, n), (size, n, 1), first)


def _solve(system: Tensor, right: Tensor, upper: bool) -> Tensor:
    """Return x of x A = b, for rows b and x of shape (B, 1, n) and a triangular A."""
    found: Tensor = torch.linalg.solve_triangular(system, right, upper=upper, left=False)
    return found
