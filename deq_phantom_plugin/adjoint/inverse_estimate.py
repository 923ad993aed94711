"""Broyden's estimate of an inverse Jacobian, kept as the steps that it took."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .._plumbing.late_read import LateRead, as_array
from .._plumbing.workspaces import Workspace, Workspaces

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
        self._initial = initial
        self._memory = _memories.take(rows, capacity)
        self._late = LateRead.is_late(rows.device)  # where to look would be to wait
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
        """Keep the samples of these indices only, with what `room` holds for them."""
        before, used = self._memory, slice(self._count + 1)
        capacity, _, size = before.steps.shape
        self._memory = _memories.take(before.steps.new_empty(len(rows), size), capacity)
        torch.index_select(before.steps[used], 1, rows, out=self._memory.steps[used])
        torch.index_select(before.system, 0, rows, out=self._memory.system)
        _memories.give_back(before)

    def trim(self) -> None:
        """Leave out steps that are not finite, and give back the memory of those not taken.

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
        """Return the next step -H r, with H updated by the last one; zero where not active.

        Args:
            active: the samples that still move, shape (B,); all if None.
        """
        n = self._count
        at = self._memory.place(n)
        if self._initial is not None:
            at.step.copy_(self._initial(at.step))
        if n > 0:
            # w = -H_{n-1} r = r + sum_{j<n-1} c_j s_{j+1}, c_j |s_j|^2 = s_j . r + sum_{i<j} ...
            self._solve(at, n)
            if n > 1:
                torch.baddbmm(at.row, at.mixing, at.mixed, out=at.row)
            # The update gives -H_n r = w / (1 - s . w / |s|^2), whose denominator is
            # s^T H y / |s|^2, since H y = s - w. If it is none, w stands for both.
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
        """Find c_j = (s_j . r + sum_{i<j} (s_j . s_{i+1}) c_i) / |s_j|^2 for j < n.

        The row of the last step is made here.
        """
        # Row vectors from the left: column vectors from the right take several times as long.
        torch.bmm(at.last_two, at.before, out=at.products)
        if n > 1:
            torch.neg(at.products_of_last, out=at.system_row)
        # Of a step of zero all products are zero: there is nothing to divide.
        torch.maximum(at.square, self._memory.tiny, out=at.system_corner)
        torch.linalg.solve_triangular(
            at.system, at.products_of_r, upper=True, left=False, out=at.coefficients
        )

    def transposed(self, vectors: Tensor) -> Tensor:
        """Return -H^T x for the last H, shape (B, D): an estimate of (I - J^T)^-1 x.

        For H_0 = -I.
        """
        n = self._count - 1
        if n < 1:
            return vectors
        # x + sum_{j<n} c_j s_j, c_j |s_j|^2 = s_{j+1} . x + sum_{i>j} (s_{j+1} . s_i) c_i
        steps, system = _kept(self._memory.steps, 0, n + 1), _part(self._memory.system, 0, 0, n, n)
        inner = torch.bmm(vectors[:, None], steps[:, 1:].mT)
        coefficients = torch.linalg.solve_triangular(system, inner, upper=False, left=False)
        return torch.baddbmm(vectors[:, None], coefficients, steps[:, :n]).squeeze(1)


class _Memory(Workspace):
    """What an estimate keeps, and computes in.

    Args:
        steps: room for s_n, shape (capacity, B, D); written before it is read.
        system: room for |s_i|^2 on the diagonal and -s_i . s_{j+1} below it, shape (B, capacity,
            capacity); zero above, where it is never written.

    Attributes:
        products: room for inner products, 2 B n numbers.
        coefficients: room for the solution of the system, B n numbers.
        change: room for the denominator of a step, shape (B, 1, 1).
        one: the number 1. Operations on tensors of no dimension take less than on Python's numbers.
        smallest: `_SMALLEST`.
        tiny: the smallest number of the dtype.
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
        """Return one for so many steps, which are like the rows."""
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
        step: s_n, and r before, shape (B, D).
        row: the same, shape (B, 1, D).
        last_two: s_{n-1} and r, shape (B, 2, D).
        before: s_0 ... s_{n-1} as columns, shape (B, D, n).
        products: of the last two with those, shape (B, 2, n).
        products_of_r: its second row, shape (B, 1, n).
        products_of_last: s_{n-1} . s_{j+1} for j < n - 1, shape (B, 1, n - 1).
        system_row: where the system has these, with the other sign.
        square: |s_{n-1}|^2, shape (B, 1, 1).
        system_corner: where the system has it.
        system: its part in use, transposed, shape (B, n, n).
        coefficients: c, shape (B, 1, n).
        mixing: c_j for j < n - 1, shape (B, 1, n - 1).
        mixed: s_{j+1} for those, shape (B, n - 1, D).
        last: c_{n-1}, shape (B, 1, 1).
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
    """Return n of the steps, shape (B, n, D)."""
    return steps[first : first + n].movedim(0, 1)


def _part(system: Tensor, row: int, column: int, height: int, width: int) -> Tensor:
    """Return a part of the system, shape (B, height, width)."""
    return system[:, row : row + height, column : column + width]


def _smallest(numbers: Tensor) -> float:
    """Return the smallest absolute value of (B, 1, 1) numbers, zero if one is NaN."""
    if len(numbers) == 1:
        number = abs(numbers.tolist()[0][0][0])
        return number if number == number else 0.0
    return float(np.nan_to_num(np.abs(as_array(numbers)).min(initial=np.inf), posinf=np.inf))
