"""Broyden's estimate of an inverse Jacobian, kept as the steps that it took.

What is solved: r(x) = F(x) - x = 0, with full steps x_(n+1) = x_n + s_n and s_n = -H_n r(x_n). H_n
estimates (J - I)^-1. Shapes are those of one sample: x, r and s_n are (D,), H_n is (D, D) and is
never formed.

1. Broyden's update of H_n (first method), with y_n = r(x_(n+1)) - r(x_n):

       H_(n+1) = H_n + (s_n - H_n y_n) s_n^T H_n / (s_n^T H_n y_n).

2. Let w = -H_n r(x_(n+1)). Since -H_n r(x_n) = s_n, H_n y_n = s_n - w. So the update adds
   w s_n^T H_n / (|s_n|^2 - s_n . w), and the next step is

       s_(n+1) = -H_(n+1) r(x_(n+1)) = w / (1 - s_n . w / |s_n|^2).

3. w is parallel to s_(n+1). Put into step 1, that makes the update a product:

       H_(n+1) = (I + s_(n+1) s_n^T / |s_n|^2) H_n.

   (Kelley 1995, "Iterative Methods for Linear and Nonlinear Equations", section 7.3.) H_n is H_0
   times n such factors, so one vector per iteration is kept. A sum of outer products needs two.

4. The product with H (`step`). From right to left the factors give w_0 = -H_0 r and
   w_(j+1) = w_j + c_j s_(j+1) with c_j = s_j . w_j / |s_j|^2. Put into one another:

       c_j |s_j|^2 = s_j . w_0 + sum_(i<j) (s_j . s_(i+1)) c_i,    w = w_0 + sum_j c_j s_(j+1).

   That is a triangular system for c, of shape (n,), and one combination of vectors. So a product
   reads the vectors twice: for inner products and for the combination. The inner products of the
   newest step, a new row of the system, come out of the same pass. (A recurrence could give them
   without one, but not in float32.) The last c is the s_n . w / |s_n|^2 of step 2.

5. The product with H^T (`transposed`) takes the factors from left to right:

       c_j |s_j|^2 = s_(j+1) . x + sum_(i>j) (s_(j+1) . s_i) c_i,    -H^T x = x + sum_j c_j s_j.

   That is for H_0 = -I.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .._plumbing.late_read import LateRead, as_array
from .._plumbing.workspaces import Workspace, Workspaces

Product = Callable[[Tensor], Tensor]

# The smallest usable |1 - s . w / |s|^2|, the denominator of step 2. A smaller one is a division by
# zero, or overflows float32 within some hundred steps of ill-conditioned problems.
_SMALLEST = 1e-5


class InverseEstimate:
    """H, an estimate of (J - I)^-1 per sample, from the steps of Broyden's first method.

    The module's text derives it.

    Args:
        rows: a tensor of the shape, dtype and device of r, a (B, D) matrix.
        capacity: the largest number of steps.
        initial: x -> -H_0 x on (B, D) matrices; None for H_0 = -I.
    """

    def __init__(self, rows: Tensor, capacity: int, initial: Product | None = None) -> None:
        self._initial = initial
        self._memory = _memories.take(rows, capacity)
        self._late = LateRead.is_late(rows.device)  # then a look would wait for the device
        self._count = 0

    @property
    def is_full(self) -> bool:
        """Whether no step can be kept any more."""
        return self._count == len(self._memory.steps)

    def forget(self) -> None:
        """Begin anew with H_0."""
        self._count = 0

    def release(self) -> None:
        """Give the memory to the next estimate; this one is not to be used any more."""
        _memories.give_back(self._memory)

    def select(self, rows: Tensor) -> None:
        """Keep only the samples of these indices, also in `room`.

        Args:
            rows: the indices, shape (number of samples that stay,).
        """
        before, used = self._memory, slice(self._count + 1)
        capacity, _, size = before.steps.shape
        self._memory = _memories.take(before.steps.new_empty(len(rows), size), capacity)
        torch.index_select(before.steps[used], 1, rows, out=self._memory.steps[used])
        torch.index_select(before.system, 0, rows, out=self._memory.system)
        _memories.give_back(before)

    def trim(self) -> None:
        """Replace steps that are not finite by zero, and free the memory of steps not taken.

        Where residuals are looked at late, or rarely, samples go on for a while after a NaN.
        """
        n = self._count
        steps, system = self._memory.steps, self._memory.system
        steps[:n].masked_fill_(~steps[:n].isfinite().all(dim=2, keepdim=True), 0)
        most = torch.finfo(steps.dtype).max
        squares = system.diagonal(dim1=1, dim2=2).nan_to_num(nan=most, posinf=most)
        system = system.nan_to_num(nan=0, posinf=0, neginf=0)
        system.diagonal(dim1=1, dim2=2).copy_(squares)
        if 2 * n < len(steps):
            steps, system = steps[:n].clone(), system[:, :n, :n].clone()
        self._memory = _Memory(steps, system)

    @property
    def room(self) -> Tensor:
        """Where to write r at the current point before `step`, shape (B, D)."""
        return self._memory.place(self._count).step

    def step(self, active: Tensor | None = None) -> Tensor:
        """Return the next step s_n = -H_n r, shape (B, D): steps 4 and 2 of the module's text.

        It is zero in the samples that are not active. r is what was written to `room`.

        Args:
            active: the samples that still move, shape (B,); all if None.
        """
        n = self._count
        at = self._memory.place(n)
        if self._initial is not None:
            at.step.copy_(self._initial(at.step))
        if n > 0:
            # w = -H_(n-1) r = w_0 + sum_(j<n-1) c_j s_(j+1)
            self._solve(at, n)
            if n > 1:
                torch.baddbmm(at.row, at.mixing, at.mixed, out=at.row)
            # s_n = w / (1 - c_(n-1)); w itself where the denominator is too small
            change = torch.sub(self._memory.one, at.last, out=self._memory.change)
            if self._late or _smallest(change) <= _SMALLEST:
                one, smallest = self._memory.one, self._memory.smallest
                change = torch.where(torch.gt(change.abs(), smallest), change, one)
            torch.div(at.row, change, out=at.row)
        if active is not None:
            at.step.masked_fill_(~active[:, None], 0)  # NaN times zero is NaN
        self._count = n + 1
        return at.step

    def _solve(self, at: _Place, n: int) -> None:
        """Find c_0 ... c_(n-1), step 4, after the system has got the row of the last step."""
        # Row vectors from the left: column vectors from the right take several times as long.
        torch.bmm(at.last_two, at.before, out=at.products)
        if n > 1:
            torch.neg(at.products_of_last, out=at.system_row)
        # All inner products of a step of zero are zero: the diagonal may then be any number.
        torch.maximum(at.square, self._memory.tiny, out=at.system_corner)
        torch.linalg.solve_triangular(
            at.system, at.products_of_r, upper=True, left=False, out=at.coefficients
        )

    def transposed(self, vectors: Tensor) -> Tensor:
        """Return -H^T x for the last H: an estimate of (I - J^T)^-1 x, step 5.

        Args:
            vectors: x, shape (B, D).
        """
        n = self._count - 1
        if n < 1:
            return vectors
        # inner: s_(j+1) . x, shape (B, 1, n); coefficients: c, shape (B, 1, n)
        steps, system = _kept(self._memory.steps, 0, n + 1), _part(self._memory.system, 0, 0, n, n)
        inner = torch.bmm(vectors[:, None], steps[:, 1:].mT)
        coefficients = torch.linalg.solve_triangular(system, inner, upper=False, left=False)
        return torch.baddbmm(vectors[:, None], coefficients, steps[:, :n]).squeeze(1)


class _Memory(Workspace):
    """The memory of an estimate.

    Args:
        steps: room for s_n, shape (capacity, B, D). It is written before it is read.
        system: room for the system of step 4, shape (B, capacity, capacity): |s_i|^2 on the
            diagonal and -s_i . s_(j+1) below it. Above the diagonal it is zero, and never written.

    Attributes:
        products: room for inner products, 2 B n numbers.
        coefficients: room for the solution of the system, B n numbers.
        change: room for the denominator of a step, shape (B, 1, 1).
        one: the number 1. Operations with a tensor of no dimension take less time than with a
            number of Python's.
        smallest: `_SMALLEST`.
        tiny: the smallest positive number of the dtype.
    """

    def __init__(self, steps: Tensor, system: Tensor) -> None:
        self.steps, self.system = steps, system
        batch, size, _ = system.shape
        self.products = steps.new_empty(2 * batch * size)
        self.coefficients = steps.new_empty(batch * size)
        self.change = steps.new_empty(batch, 1, 1)
        self.one, self.smallest = steps.new_tensor(1.0), steps.new_tensor(_SMALLEST)
        self.tiny = steps.new_tensor(torch.finfo(steps.dtype).tiny)
        self._places: list[_Place] = []

    @classmethod
    def made(cls, rows: Tensor, capacity: int) -> _Memory:
        """Return memory for `capacity` steps that are like the rows."""
        batch, size = rows.shape
        steps = rows.new_empty(capacity, batch, size)
        return cls(steps, rows.new_zeros(batch, capacity, capacity))

    def place(self, n: int) -> _Place:
        """Return what the n-th step reads and writes."""
        while len(self._places) <= n:
            self._places.append(_Place(self, len(self._places)))
        return self._places[n]


_memories = Workspaces(_Memory.made)


class _Place:
    """What the n-th step reads and writes, as views.

    Attributes:
        step: s_n, and r before s_n is known, shape (B, D).
        row: the same memory, shape (B, 1, D).
        last_two: s_(n-1) and r, shape (B, 2, D).
        before: s_0 ... s_(n-1) as columns, shape (B, D, n).
        products: the inner products of `last_two` with `before`, shape (B, 2, n).
        products_of_r: the second row of `products`, shape (B, 1, n).
        products_of_last: s_(n-1) . s_(j+1) for j < n - 1, shape (B, 1, n - 1).
        system_row: the place of these in the system, where they have the other sign.
        square: |s_(n-1)|^2, shape (B, 1, 1).
        system_corner: the place of this number in the system.
        system: the part of the system that is in use, transposed, shape (B, n, n).
        coefficients: c, shape (B, 1, n).
        mixing: c_j for j < n - 1, shape (B, 1, n - 1).
        mixed: s_(j+1) for j < n - 1, shape (B, n - 1, D).
        last: c_(n-1), shape (B, 1, 1).
    """

    def __init__(self, memory: _Memory, n: int) -> None:
        steps, system = memory.steps, memory.system
        self.step = steps[n]
        self.row = self.step[:, None]
        if n == 0:
            return
        batch = len(system)
        self.last_two = _kept(steps, n - 1, 2)
        self.before = _kept(steps, 0, n).mT
        self.products = memory.products[: 2 * batch * n].view(batch, 2, n)
        self.products_of_r = self.products[:, 1:]
        self.products_of_last = self.products[:, :1, 1:]
        self.system_row = _part(system, n - 1, 0, 1, n - 1)
        self.square = self.products[:, :1, n - 1 :]
        self.system_corner = _part(system, n - 1, n - 1, 1, 1)
        self.system = _part(system, 0, 0, n, n).mT
        self.coefficients = memory.coefficients[: batch * n].view(batch, 1, n)
        self.mixing = self.coefficients[:, :, : n - 1]
        self.mixed = _kept(steps, 1, n - 1)
        self.last = self.coefficients[:, :, n - 1 :]


def _kept(steps: Tensor, first: int, n: int) -> Tensor:
    """Return n of the steps, from the one of number `first`, shape (B, n, D)."""
    return steps[first : first + n].movedim(0, 1)


def _part(system: Tensor, row: int, column: int, height: int, width: int) -> Tensor:
    """Return a part of the system, shape (B, height, width)."""
    return system[:, row : row + height, column : column + width]


def _smallest(numbers: Tensor) -> float:
    """Return the smallest absolute value of numbers of shape (B, 1, 1); zero if one is NaN."""
    if len(numbers) == 1:
        number = abs(numbers.tolist()[0][0][0])
        return number if number == number else 0.0
    return float(np.nan_to_num(np.abs(as_array(numbers)).min(initial=np.inf), posinf=np.inf))
