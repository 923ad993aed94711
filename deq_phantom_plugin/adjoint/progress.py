"""The bookkeeping that all adjoint solvers share: residuals, stopping, the best so far."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._plumbing.late_read import LateRead
from ..contract.errors import NonFiniteError
from .clip import Clip
from .packing import relative_norm

Apply = Callable[[Tensor], Tensor]
"""x -> J^T x on (B, D) matrices."""


@dataclass(frozen=True)
class Solution:
    """What an adjoint solver found.

    Attributes:
        x: the solution, shape (B, D).
        residual: ||rhs - (I - J^T) x|| per sample, shape (B,). It is computed from this definition,
            and not from a recurrence.
        n_vjp: the number of products with J^T.
        trace: the residual after each of N checks, shape (B, N).
        converged: whether every sample reached the tolerance.
        at_rounding: the samples that stopped above the tolerance because F's own rounding keeps
            their residual there, shape (B,).
        n_clipped: the number of products that were clipped, each counted once per sample.
    """

    x: Tensor
    residual: Tensor
    n_vjp: int
    trace: Tensor
    converged: bool
    at_rounding: Tensor
    n_clipped: int = 0


def choose(chosen: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Return `new` in the chosen samples and `old` in the others.

    Where all samples are chosen, or none, no copy is made (on the CPU).

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


# A sample whose residual has not halved in so many checks may be down at F's rounding. Above
# `_COARSE` it is not: the coarsest eps, bfloat16's, is 8e-3.
_PATIENCE, _COARSE = 5, 0.1
_FLOOR = 4.0  # residuals over the rounding of one product that more products hardly improve


class Progress:
    """Follows a solve of (I - J^T) x = rhs, sample by sample.

    Rows of `rhs` have norm one or are zero. A row of zeros counts as solved as long as no other
    sample reaches into it.

    No solve gets below the rounding of F's products, which is far above that of the state where F
    computes in 16 bits. How far a product is from linear tells this rounding. It is measured at
    most once per solve, and only where the residual stagnates. Samples that are down there stop.

    Args:
        apply: x -> J^T x, on rows of shape (B, D). Its calls are counted.
        rhs: the right-hand side, shape (B, D).
        tol: the residual to reach in every sample.
        max_vjp: the largest number of products.
        clip: bounds each product. The residuals on the way are then those of
            x = rhs + clip(J^T x); that of the solution is of the system itself.

    Attributes:
        active: the samples that are still to be solved, shape (B,).
        exhausted: whether the products are used up.
    """

    def __init__(
        self, apply: Apply, rhs: Tensor, tol: float, max_vjp: int, clip: Clip | None = None
    ) -> None:
        self._apply, self._clip = apply, clip
        self.rhs, self.tol, self.max_vjp = rhs, tol, max_vjp
        self.n_vjp = 0
        self._best = torch.zeros_like(rhs)
        norm = torch.linalg.vector_norm(rhs, dim=1)
        self.active = norm > 0
        # Any iterate is better than none: a gradient of zero trains nothing.
        self._best_residual = torch.where(self.active, torch.inf, norm)
        self._last = self.active, self.active  # which improved at the last check, and counted
        self._trace: list[Tensor] = []
        self._rounding: Tensor | None = None  # of a product, relative to it, shape ()
        self._at_rounding = torch.zeros_like(self.active)
        self._stopped = torch.zeros_like(norm)  # of the iterates that those stopped at
        self._limit = torch.full_like(norm, tol)  # what each sample's residual is to reach
        self._late = LateRead(rhs.device)
        # The best residuals as the host's numbers, where it reads at once and all are active.
        self._lowest: list[float] | None = None
        if not LateRead.is_late(rhs.device) and bool(self.active.all()):
            self._lowest = [math.inf] * len(rhs)

    @property
    def remaining(self) -> int:
        """The number of products that may still be taken."""
        return self.max_vjp - self.n_vjp

    @property
    def exhausted(self) -> bool:
        """Whether no product may be taken any more."""
        return self.remaining <= 0

    def apply(self, x: Tensor) -> Tensor:
        """Return J^T x, clipped if that is asked for, and count it."""
        return self._bounded(self._product(x))

    def _product(self, x: Tensor) -> Tensor:
        self.n_vjp += 1
        return self._apply(x)

    def _bounded(self, product: Tensor) -> Tensor:
        return product if self._clip is None else self._clip(product)

    def record(self, x: Tensor, residual: Tensor, at_once: bool = False) -> bool:
        """Take note of an iterate and its residual vector; return whether all are solved.

        The iterate is kept as it is, and must not be changed afterwards.

        Args:
            x: the iterate, shape (B, D).
            residual: rhs - (I - J^T) x.
            at_once: whether the host waits for the residual even where it usually reads it late.

        Raises:
            NonFiniteError: if a residual is NaN or infinite.
        """
        norm = torch.linalg.vector_norm(residual, dim=1)
        counted = self.active
        if self._improves(norm):
            self._best, self._best_residual = x, norm
            self._trace.append(norm)
            self._last = counted, counted
            self._look_at_rounding(x, residual, at_once)
            return self._lowest is None and not self.go_on(self.active, norm, counted)
        better = norm < self._best_residual
        self._last = better, counted
        if norm.device.type != "cpu" or not bool(counted.all()):
            # What was solved is kept where it is; if it is solved no more, others reach in. One at
            # rounding may have stopped beside its best.
            beside = self._at_rounding & (norm <= 2 * self._stopped)
            better = better | (~counted & torch.isfinite(norm) & ~beside)
        self._best = choose(better, x, self._best)
        self._best_residual = torch.where(better, norm, self._best_residual)
        self._trace.append(self._best_residual)
        self.active = self._best_residual > self._limit
        self._lowest = None
        self._look_at_rounding(x, residual, at_once)
        late = None if at_once else self._late
        if not self.go_on(self.active, norm, counted, late):
            return True
        if not LateRead.is_late(norm.device) and bool(self.active.all()):
            self._lowest = self._best_residual.tolist()
        return False

    def _improves(self, norm: Tensor) -> bool:
        """Whether in every sample the residual fell, and is still above the tolerance.

        That is so in most iterations. The host then has nothing more to look at or to choose.
        """
        if self._lowest is None:
            return False
        numbers: list[float] = norm.tolist()
        for new, old in zip(numbers, self._lowest, strict=True):
            if not self.tol < new < old:  # NaN neither
                return False
        self._lowest = numbers
        return bool(numbers)

    def choose(self, new: Tensor, old: Tensor) -> Tensor:
        """Return `new` in the samples that are active, and `old` in the others."""
        return choose(self.active, new, old) if self._lowest is None else new

    def _look_at_rounding(self, x: Tensor, residual: Tensor, at_once: bool) -> None:
        """Stop samples that are down at F's rounding, where it is time to look for that."""
        # A solver that looks at once had thought to be there: its next try is the proof.
        patience = 1 if at_once else _PATIENCE
        due = len(self._trace) > patience and (len(self._trace) - 1) % patience == 0
        if due and self.tol > 0:  # with a tolerance of zero all products are to be taken
            self._stop_at_rounding(x, residual, self._trace[-patience - 1], at_once)

    def _stop_at_rounding(self, x: Tensor, residual: Tensor, before: Tensor, at_once: bool) -> None:
        """Stop samples whose residual is what F's rounding makes of it, and falls no more.

        Args:
            x: an iterate, shape (B, D).
            residual: its residual vector.
            before: the best residual some checks ago, shape (B,).
            at_once: whether the host may look.
        """
        stuck = self.active & (self._best_residual <= _COARSE) & (2 * self._best_residual > before)
        if self._rounding is None:
            waits = at_once or not LateRead.is_late(x.device)  # elsewhere to ask would be to wait
            if self.exhausted or (waits and not bool(stuck.any())):
                return
        image = x - self.rhs + residual  # J^T x
        size = torch.linalg.vector_norm(image, dim=1)
        found = stuck & (self._best_residual <= _FLOOR * self.rounding(x, image) * size)
        self._at_rounding = self._at_rounding | found
        self._limit = torch.where(found, 2 * self._best_residual, self._limit)
        norm = torch.linalg.vector_norm(residual, dim=1)
        self._stopped = torch.where(found, norm, self._stopped)
        self.active = self.active & ~found
        if self._lowest is not None and not bool(self.active.all()):
            self._lowest = None

    def rounding(self, x: Tensor, image: Tensor) -> Tensor:
        """Return the relative rounding of a product, shape (). The first call costs one product.

        It is the largest of the batch, since that of one sample may be small by chance.

        Args:
            x: any rows, shape (B, D).
            image: J^T x, clipped if products are.
        """
        if self._rounding is None:
            # 1.5 is no power of two. So all numbers of the second product are rounded anew.
            again = self._bounded(1.5 * self._product(x / 1.5))
            relative = relative_norm(again - image, image)
            self._rounding = relative.amax() if len(relative) else relative.sum()
        return self._rounding

    def go_on(
        self, active: Tensor, norm: Tensor, counted: Tensor, late: LateRead | None = None
    ) -> bool:
        """Return whether any sample is active; the one place where the host looks at the device.

        Args:
            active: the samples that are still to be solved, shape (B,).
            norm: a number that was computed of each sample, shape (B,).
            counted: the samples in which that number must be finite, shape (B,).
            late: how to read both late; None to read them at once.

        Raises:
            NonFiniteError: if not all that count are finite.
        """
        if norm.device.type == "cpu" and (late is None or not late.is_late(norm.device)):
            if not math.isfinite(norm.sum()):
                self.check_finite((~torch.isfinite(norm) & counted).tolist())
            return bool(active.any())
        broken = ~torch.isfinite(norm) & counted
        flags = torch.cat([active.any()[None], broken])
        found = flags.tolist() if late is None else late.read(flags)
        return self._evaluate(found)

    def _evaluate(self, flags: list[bool] | None) -> bool:
        if flags is None:
            return True
        self.check_finite(flags[1:])
        return flags[0]

    def check_finite(self, broken: list[bool]) -> None:
        """Refuse to go on if a sample is broken.

        Args:
            broken: for each sample, whether what was computed of it is NaN or infinite.

        Raises:
            NonFiniteError: if one is.
        """
        where = [index for index, flag in enumerate(broken) if flag]
        if where:
            error = NonFiniteError(
                f"the residual became NaN or infinite after {self.n_vjp} vector-Jacobian products, "
                f"in {len(where)} of {len(broken)} samples (the first: {where[0]})"
            )
            error.samples = where
            raise error

    def solution(self) -> Solution:
        """Return the best iterate that was recorded for each sample.

        Where a solve stops short, a sample whose every iterate is worse than zero gets its
        right-hand side instead. One more product then tells the residual. It is also taken where
        the iterates of the samples are from different steps: if samples that were said to be
        independent are not, the residual of that mixture is another. Where products were clipped,
        the residual is taken again, of the system without a clip.

        Raises:
            NonFiniteError: if a residual is NaN or infinite.
        """
        self._evaluate(self._late.last())
        better, counted = self._last
        worse = self.active & (self._best_residual > torch.linalg.vector_norm(self.rhs, dim=1))
        mixed = worse.any() | ~(better | ~counted).all()
        if bool(self.active.any() & mixed):
            self._best = choose(worse, self.rhs, self._best)
            rest = self.rhs - self._best + self.apply(self._best)
            self._best_residual = torch.linalg.vector_norm(rest, dim=1)
            self._trace.append(self._best_residual)
        n_clipped = 0 if self._clip is None else self._clip.n_clipped
        if n_clipped:
            rest = self.rhs - self._best + self._product(self._best)
            self._best_residual = torch.linalg.vector_norm(rest, dim=1)
            self._trace.append(self._best_residual)
            self._at_rounding = self._at_rounding & (self._best_residual <= self._limit)
        trace = self._trace or [self._best_residual]
        return Solution(
            self._best,
            self._best_residual,
            self.n_vjp,
            torch.stack(trace, dim=1),
            not bool((self._best_residual > self.tol).any()),
            self._at_rounding & ~self.active,
            n_clipped,
        )
