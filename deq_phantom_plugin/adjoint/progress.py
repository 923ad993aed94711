"""The bookkeeping that all adjoint solvers share: residuals, stopping, the best so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NonFiniteError

Apply = Callable[[Tensor], Tensor]
"""x -> J^T x on (B, D) matrices."""


@dataclass(frozen=True)
class Solution:
    """What an adjoint solver found.

    Attributes:
        x: the solution, shape (B, D).
        residual: ||rhs - (I - J^T) x|| for each sample, shape (B,), computed from its definition
            and not from a recurrence.
        n_vjp: products with J^T taken.
        trace: the residual after each check, shape (B, N).
        converged: whether every sample reached the tolerance.
    """

    x: Tensor
    residual: Tensor
    n_vjp: int
    trace: Tensor
    converged: bool


def choose(chosen: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Return `new` in the chosen samples and `old` in the others; one of them itself if it can be.

    Args:
        chosen: shape (B,).
        new: shape (B, ...), or of no dimension if there is one sample.
        old: of the same shape.
    """
    if chosen.device.type == "cpu":  # elsewhere to ask would be to wait for the device
        if bool(chosen.all()):
            return new
        if not bool(chosen.any()):
            return old
    shape = (-1, *[1] * (new.dim() - 1)) if new.dim() > 0 else ()
    return torch.where(chosen.reshape(shape), new, old)


class Progress:
    """Follows a solve of (I - J^T) x = rhs sample by sample.

    Rows of `rhs` have norm one, or are zero and then solved from the start.

    Args:
        apply: the product with J^T; counted.
        rhs: the right-hand side, shape (B, D).
        tol: the residual to reach.
        max_vjp: the most products to take.

    Attributes:
        active: the samples that are still to be solved, shape (B,).
        exhausted: whether the products are used up.
    """

    def __init__(self, apply: Apply, rhs: Tensor, tol: float, max_vjp: int) -> None:
        self._apply = apply
        self.rhs, self.tol, self.max_vjp = rhs, tol, max_vjp
        self.n_vjp = 0
        self._best = torch.zeros_like(rhs)
        norm = torch.linalg.vector_norm(rhs, dim=1)
        self.active = norm > 0
        # Any iterate is better than none: a gradient of zero trains nothing.
        self._best_residual = torch.where(self.active, torch.inf, norm)
        self._trace: list[Tensor] = []
        self._converged = False

    @property
    def remaining(self) -> int:
        """Products that may still be taken."""
        return self.max_vjp - self.n_vjp

    @property
    def exhausted(self) -> bool:
        """Whether no product may be taken any more."""
        return self.remaining <= 0

    def apply(self, x: Tensor) -> Tensor:
        """Return J^T x, and count it."""
        self.n_vjp += 1
        return self._apply(x)

    def record(self, x: Tensor, residual: Tensor) -> bool:
        """Take note of an iterate and its residual vector; return whether all are solved.

        The iterate is kept as it is, and must not be changed afterwards.

        The one place where the host waits for the device: one flag for "go on" and one for
        "non-finite" travel together.

        Raises:
            NonFiniteError: if a residual is NaN or infinite.
        """
        norm = torch.linalg.vector_norm(residual, dim=1)
        better = self.active & (norm < self._best_residual)
        self._best = choose(better, x, self._best)
        self._best_residual = torch.where(better, norm, self._best_residual)
        self._trace.append(self._best_residual)
        finite = torch.isfinite(norm) | ~self.active
        self.active = self.active & ~(self._best_residual <= self.tol)
        self._converged = not self.go_on(self.active, finite)
        return self._converged

    def go_on(self, active: Tensor, finite: Tensor) -> bool:
        """Return whether any sample is active.

        Raises:
            NonFiniteError: if not all are finite.
        """
        any_active, all_finite = torch.stack([active.any(), finite.all()]).tolist()
        if not all_finite:
            where = torch.nonzero(~finite).flatten().tolist()
            raise NonFiniteError(
                f"the residual became NaN or infinite after {self.n_vjp} vector-Jacobian products, "
                f"in {len(where)} of {finite.numel()} samples (the first: {where[0]})"
            )
        return bool(any_active)

    def solution(self) -> Solution:
        """Return the best iterate that was recorded for each sample."""
        trace = self._trace or [self._best_residual]
        return Solution(
            self._best,
            self._best_residual,
            self.n_vjp,
            torch.stack(trace, dim=1),
            self._converged,
        )
