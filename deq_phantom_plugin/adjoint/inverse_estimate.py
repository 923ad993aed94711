"""Broyden's estimate of an inverse Jacobian, kept as the steps that it took."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]

# Updates whose denominator is smaller than this, relative to its vectors, are skipped: in float32
# they overflow within some hundred steps of ill-conditioned problems.
_SKIP = 1e-5


class InverseEstimate:
    """H, an estimate of (J - I)^-1 for each sample, from the steps of Broyden's first method.

    With full steps s_n = -H_n r(x_n) of r(x) = F(x) - x, Broyden's update of H_n is a product,

        H_n = (I + s_n s_{n-1}^T / |s_{n-1}|^2) ... (I + s_1 s_0^T / |s_0|^2) H_0

    (Kelley 1995, "Iterative Methods for Linear and Nonlinear Equations", section 7.3), so that one
    vector an iteration is kept where the two factors of a sum of outer products would be two, and a
    product with H reads them twice: once for inner products and once for their combination, whose
    coefficients solve a small triangular system in the steps' Gram matrix. A row of that matrix
    comes out of the same pass. (From a recurrence it could be had without, but not in float32.)

    Args:
        rows: the shape, dtype and device of r, a (B, D) matrix.
        capacity: the most steps.
        initial: x -> -H_0 x on (B, D) matrices; x itself if None.
    """

    def __init__(self, rows: Tensor, capacity: int, initial: Product | None = None) -> None:
        batch, size = rows.shape
        self._initial = initial
        self._steps = rows.new_empty(batch, capacity, size)  # written before read
        self._gram = rows.new_zeros(batch, capacity, capacity)
        # 1 / |s_j|^2, or zero where the update with s_j and s_{j+1} is skipped.
        self._weights = rows.new_zeros(batch, capacity)
        self._count = 0

    @property
    def is_full(self) -> bool:
        """Whether no step can be kept any more."""
        return self._count == self._steps.shape[1]

    def forget(self) -> None:
        """Begin anew with H_0."""
        self._count = 0

    def select(self, rows: Tensor) -> None:
        """Keep the samples of these indices only, with what `room` holds for them."""
        steps = self._steps.new_empty(len(rows), *self._steps.shape[1:])
        used = slice(None, self._count + 1)
        torch.index_select(self._steps[:, used], 0, rows, out=steps[:, used])
        self._steps, self._gram, self._weights = steps, self._gram[rows], self._weights[rows]

    def trim(self) -> None:
        """Give back the memory of steps that were not taken, where that is most of it."""
        if 2 * self._count < self._steps.shape[1]:
            self._steps = self._steps[:, : self._count].clone()

    @property
    def room(self) -> Tensor:
        """Where to write r at the current point before `step`, shape (B, D)."""
        return self._steps[:, self._count]

    def step(self, active: Tensor) -> Tensor:
        """Return the next step -H r, with H updated by the last one; zero where not active.

        Args:
            active: the samples that still move, shape (B,).
        """
        n = self._count
        step = self.room
        if self._initial is not None:
            step.copy_(self._initial(step))
        scale = step.new_ones(len(step))
        if n > 0:
            coefficients = self._forward(self._inner(self._steps[:, n - 1 : n + 1], n), n)
            if n > 1:
                mixed = coefficients[:, None, :-1]
                step = torch.baddbmm(step[:, None], mixed, self._steps[:, 1:n]).squeeze(1)
        square = torch.linalg.vector_norm(step, dim=1).square()
        if n > 0:
            # With w = -H_{n-1} r, the update gives -H_n r = w / (1 - s . w / |s|^2).
            last, weight = coefficients[:, -1], self._weights[:, n - 1]
            # The update's denominator is s^T H y = |s|^2 - s . w, with H y = s - w.
            relative = (1 - 2 * last + square * weight).clamp(min=0).sqrt()
            usable = (1 - last).abs() > _SKIP * relative
            self._weights[:, n - 1] = torch.where(usable, weight, 0)
            scale = scale / torch.where(usable, 1 - last, 1)
        return self._keep(step, torch.where(active, scale, 0), square, active)

    def transposed(self, vectors: Tensor) -> Tensor:
        """Return -H^T x for the last H, shape (B, D): an estimate of (I - J^T)^-1 x.

        For H_0 = -I.
        """
        n = self._count
        if n < 2:
            return vectors
        pair = torch.stack([self._steps[:, n - 1], vectors], dim=1)
        mixed = self._backward(self._inner(pair, n)[:, 1:], n)[:, None]
        return torch.baddbmm(vectors[:, None], mixed, self._steps[:, : n - 1]).squeeze(1)

    def _inner(self, pair: Tensor, n: int) -> Tensor:
        """Return the inner products of a vector with all steps, and keep those of the last step.

        Args:
            pair: the last step and the vector, shape (B, 2, D).
            n: how many steps there are.
        """
        # Row vectors from the left: column vectors from the right take several times as long.
        products = pair @ self._steps[:, :n].mT
        self._gram[:, n - 1, :n] = self._gram[:, :n, n - 1] = products[:, 0]
        return products[:, 1]

    def _forward(self, inner: Tensor, n: int) -> Tensor:
        """Return c with c_j = (s_j . x + sum_{i<j} (s_j . s_{i+1}) c_i) / |s_j|^2, for j < n."""
        coupling = torch.nn.functional.pad(self._gram[:, :n, 1:n], (0, 1)).tril(-1)
        return self._solve(coupling, inner, self._weights[:, :n], upper=False)

    def _backward(self, inner: Tensor, n: int) -> Tensor:
        """Return c with c_j = (s_{j+1} . x + sum_{i>j} (s_{j+1} . s_i) c_i) / |s_j|^2."""
        coupling = self._gram[:, 1:n, : n - 1].triu(1)
        return self._solve(coupling, inner, self._weights[:, : n - 1], upper=True)

    @staticmethod
    def _solve(coupling: Tensor, inner: Tensor, weights: Tensor, upper: bool) -> Tensor:
        identity = torch.eye(inner.shape[1], dtype=inner.dtype, device=inner.device)
        coefficients: Tensor = torch.linalg.solve_triangular(
            identity - weights[:, :, None] * coupling,
            (weights * inner)[:, :, None],
            upper=upper,
            unitriangular=True,
        )
        return coefficients.squeeze(2)

    def _keep(self, step: Tensor, scale: Tensor, square: Tensor, active: Tensor) -> Tensor:
        n = self._count
        kept = torch.mul(step, scale[:, None], out=self._steps[:, n])
        square = square * scale.square()
        if active.device.type != "cpu" or not bool(active.all()):
            kept.masked_fill_(~active[:, None], 0)  # NaN times zero is NaN
        usable = (square > 0) & torch.isfinite(square)
        self._weights[:, n] = torch.where(usable, 1 / torch.where(usable, square, 1), 0)
        self._count = n + 1
        return kept
