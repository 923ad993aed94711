"""What all forward solvers share: residuals, the best state so far, and when to stop."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._plumbing.late_read import LateRead, as_array
from ..adjoint import Packing
from ..contract.state import State, flatten, unflatten
from .solution import ForwardSolution, InverseJacobian

STOP_MODES = ("abs", "rel")
PATIENCE = 3
"""Looks without a better state after which a solve of rounded numbers ends. Broyden's residual may
rise for one or two looks and fall again."""


class Rows:
    """F on a matrix with one row per sample, for solvers that mix states by inner products.

    Attributes:
        packing: turns leaves into rows, and back.
        start: the initial state, shape (B, D).
    """

    def __init__(
        self, func: Callable[[State], State], start: State, batch_dim: int | None = 0
    ) -> None:
        leaves, self._structure = flatten(start)
        self._func = func
        self.packing = Packing([leaf.detach() for leaf in leaves], batch_dim)
        self.start = self.packing.pack(leaves)

    def __call__(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """Return F(h) as rows, shape (B, D).

        Args:
            rows: h, shape (B, D).
            out: where to write F(h), shape (B, D). Without it the result may be the memory that F
                returned, which is the same each time where F is a CUDA graph.
        """
        return self.packing.pack(flatten(self._func(self.state([rows])))[0], out)

    def state(self, rows: Sequence[Tensor]) -> State:
        """Return rows as a state; they are the only tensor of a sequence."""
        return unflatten(self.packing.unpack(rows[0]), self._structure)

    def tracker(self, stopping: Stopping, first_step: int = 1) -> Tracker:
        """Return a tracker for a solve on these rows."""
        return Tracker([self.start], 0, self.start, stopping, first_step=first_step)


class Stopping(NamedTuple):
    """When a solve stops.

    Attributes:
        max_iter: the largest number of iterations. Traces are filled up to it.
        tol: the residual to reach in every sample.
        mode: the residual that is meant: "abs", ||F(h) - h||, or "rel", that over ||F(h)||.
        sample_at: numbers of evaluations after which the best state so far is kept as well.
        return_final: whether the last state is taken for the best, and nothing stops early.
        check_every: the iterations from one look at the residual to the next.
        rounding: the relative rounding of F; 0 for none. A sample also stops at a relative residual
            of this, and the solve where no sample has been better for `PATIENCE` looks.
    """

    max_iter: int
    tol: float
    mode: str
    sample_at: Sequence[int]
    return_final: bool
    check_every: int
    rounding: float = 0.0


class Tracker:
    """Follows a solve sample by sample, and remembers the best state.

    Samples that reach the tolerance stop, unless told otherwise. So do samples that became NaN or
    infinite. The host decides all of that, from two norms per sample. The device computes nothing
    for it as long as every iterate is the best so far. Where the host would have to wait for the
    device, it reads the norms one check late, so that there is always work queued.

    Args:
        start: the tensors of the initial state.
        batch_dim: the dimension of each tensor along which samples lie; None where they are
            coupled.
        like: a tensor of the dtype and device of the norms. Its first dimension counts samples.
        stopping: when the solve stops.
        first_step: the number of the first iteration.
        keep_going: whether samples go on for as long as others do.

    Attributes:
        moving: the samples that still move, shape (B,); None while all do.
        held: the indices of the samples that the solver's linear algebra works on; None for all.
        best: the tensors of the best state that was looked at.

    Raises:
        ValueError: if the stop mode is unknown, no iteration allowed, or `check_every` below 1.
    """

    def __init__(
        self,
        start: list[Tensor],
        batch_dim: int | None,
        like: Tensor,
        stopping: Stopping,
        *,
        first_step: int = 1,
        keep_going: bool = False,
    ) -> None:
        if stopping.mode not in STOP_MODES:
            raise ValueError(f"stop_mode={stopping.mode!r}; expected 'abs' or 'rel'")
        if stopping.max_iter < 1:
            raise ValueError(
                f"max_iter allows for {stopping.max_iter} iterations; expected at least 1"
            )
        if stopping.check_every < 1:
            raise ValueError(f"check_every={stopping.check_every}; expected at least 1")
        self._stopping, self._keep_going = stopping, keep_going or stopping.return_final
        self._batch_dim, self._first_step = batch_dim, first_step
        self._like, self._norms = like, list[Tensor]()
        self._few = len(like) <= _FEW
        self._at_once = not LateRead.is_late(like.device)
        self._late = LateRead(like.device, Tensor.tolist if self._few else as_array)
        self._unseen = deque[tuple[list[Tensor], int, int]]()
        self._sampled = list[list[Tensor]]()
        self.best = start
        self._lowest: Any = [_BEFORE] * len(like)
        self._active = np.ones(len(like), dtype=bool)
        self._idle = np.zeros(len(like), dtype=int)  # looks since a sample was better
        self._held: NDArray[Any] | None = None
        self.moving: Tensor | None = None
        self.held: Tensor | None = None

    def looks(self, n_evaluations: int) -> bool:
        """Whether the next iterate is looked at.

        Args:
            n_evaluations: the number of evaluations of F, that of this iterate included.
        """
        stop, count = self._stopping, len(self._norms) + 1
        if stop.check_every == 1 or count % stop.check_every == 0 or count == stop.max_iter:
            return True
        return n_evaluations in stop.sample_at

    def pass_over(self) -> None:
        """Take note that there was an iterate that is not looked at."""
        if not self._norms:
            before = self._like.new_full((2, len(self._like)), _BEFORE)
            before[1] = 1 - _TINY  # so that the relative one is the same
            self._norms.append(before)
        else:
            self._norms.append(self._norms[-1])

    def record(self, state: list[Tensor], norms: Tensor, n_evaluations: int) -> bool:
        """Take note of an iterate; return whether the solve is over.

        Args:
            state: the tensors of the iterate. They must not be changed before `let_go`.
            norms: ||F(h) - h|| and ||F(h)|| per sample, shape (2, B).
            n_evaluations: the number of evaluations of F so far.
        """
        self._norms.append(norms)
        seen = self._late.read(norms)
        if not self._at_once:
            self._unseen.append((state, len(self._norms), n_evaluations))
            if seen is None:
                return False
            state, _, n_evaluations = self._unseen.popleft()
        residual, image = seen
        return self._look(residual, image, state, n_evaluations)

    def let_go(self, state: list[Tensor]) -> None:
        """Copy a recorded state before its memory is overwritten, if it may still be wanted."""
        if self.best is state:
            self.best = [tensor.clone() for tensor in state]
        for index, (other, number, n_evaluations) in enumerate(self._unseen):
            if other is state:
                copied = [tensor.clone() for tensor in state]
                self._unseen[index] = copied, number, n_evaluations

    def _look(self, residual: Any, image: Any, state: list[Tensor], n_evaluations: int) -> bool:
        """Take note of the norms of an iterate; return whether the solve is over."""
        stop = self._stopping
        if self._few and not stop.rounding:
            over = self._compare_few(residual, image, state)
        else:
            over = self._compare(np.asarray(residual), np.asarray(image), state)
        if stop.return_final:
            self.best, over = state, False
        if stop.sample_at and n_evaluations in stop.sample_at:
            self._sampled.append([tensor.clone() for tensor in self.best])
        return over

    def _compare_few(self, residual: list[float], image: list[float], state: list[Tensor]) -> bool:
        """Compare an iterate with the best. For few samples Python's numbers are the quickest."""
        in_relation, tol = self._stopping.mode == "rel", self._stopping.tol
        better, lowest, goes_on = list[bool](), list[float](), list[bool]()
        for norm, size, before in zip(residual, image, self._lowest, strict=True):
            value = relative(norm, size) if in_relation else norm
            better.append(value < before)
            value = value if value < before else before
            lowest.append(value)
            goes_on.append(value >= tol and (self._keep_going or norm < math.inf))
        if all(better):
            self.best = state
        elif any(better):
            self.best = chosen(self._on_device(better), state, self.best, self._batch_dim)
        self._lowest = lowest
        if goes_on and all(goes_on) and self.moving is None:
            return False
        return self._stops(np.array(goes_on, dtype=bool))

    def _compare(self, residual: NDArray[Any], image: NDArray[Any], state: list[Tensor]) -> bool:
        """Compare an iterate with the best."""
        with np.errstate(all="ignore"):
            value = residual if self._stopping.mode == "abs" else relative(residual, image)
            better = value < self._lowest
            self._lowest = np.where(better, value, self._lowest)
            goes_on = self._lowest >= self._stopping.tol
            if not self._keep_going:
                goes_on &= np.isfinite(residual)
            if self._stopping.rounding:
                goes_on &= ~(residual <= self._stopping.rounding * image)
        if better.all():
            self.best = state
        elif better.any():
            self.best = chosen(self._on_device(better), state, self.best, self._batch_dim)
        over = self._stops(goes_on)
        if self._stopping.rounding:
            self._idle = np.where(better, 0, self._idle + 1)
            over = over or not (goes_on & self._active & (self._idle < PATIENCE)).any()
        return over

    def _stops(self, goes_on: NDArray[Any]) -> bool:
        """Return whether the solve is over.

        Args:
            goes_on: for each sample, whether it has more to find.
        """
        if self._keep_going:
            return not goes_on.any()
        active = self._active & goes_on
        if not np.array_equal(active, self._active):
            self._active, self.moving = active, self._on_device(active)
        return not active.any()

    def shrink(self) -> Tensor | None:
        """Return which of the samples in `held` are still held, once half of them are done."""
        if self.moving is None:
            return None
        active = self._active if self._held is None else self._active[self._held]
        kept = np.flatnonzero(active)
        if len(kept) > len(active) // 2:
            return None
        self._held = kept if self._held is None else self._held[kept]
        self.held = self._on_device(self._held)
        return self._on_device(kept)

    def solution(
        self,
        restore: Callable[[Sequence[Tensor]], State],
        inverse_jacobian: InverseJacobian | None = None,
    ) -> ForwardSolution:
        """Return what was found.

        Args:
            restore: from the tensors of a state to the state.
            inverse_jacobian: what the solver learned of it.
        """
        stop, count = self._stopping, len(self._norms)
        stacked = torch.stack(self._norms)
        shape = 2, stop.max_iter + 1, len(self._like)  # abs, rel
        # Of numbers that are the host's already, numpy is the quicker.
        on_host = stacked.device.type == "cpu" and not LateRead.is_late(stacked.device)
        xp: Any = np if on_host else torch
        norms: Any = as_array(stacked) if xp is np else stacked
        traces: Any = np.empty(shape, norms.dtype) if xp is np else stacked.new_empty(shape)
        used = traces[:, 1 : count + 1]
        with np.errstate(all="ignore"):
            used[0] = norms[:, 0]
            used[1] = relative(norms[:, 0], norms[:, 1])
        mode = STOP_MODES.index(stop.mode)
        self._compare_unseen(used[mode])
        if stop.sample_at and not self._sampled:
            self._sampled.append(self.best)
        if stop.return_final:
            lowest = xp.abs(used[:, -1])  # a copy
            when = xp.full_like(lowest[0], count - 1)
        else:
            usable = xp.where(xp.isfinite(used), used, xp.inf)
            lowest, when = xp.amin(usable, 1), usable[mode].argmin(0)
        traces[:, 0], traces[:, count + 1 :] = _BEFORE, lowest[:, None]
        n_steps = xp.asarray(when + self._first_step, dtype=norms.dtype)
        numbers = *lowest, traces[0].T, traces[1].T, n_steps
        found = numbers if xp is torch else map(torch.from_numpy, numbers)
        abs_lowest, rel_lowest, abs_trace, rel_trace, n_steps = found
        return ForwardSolution(
            restore(self.best),
            [restore(tensors) for tensors in self._sampled],
            abs_lowest,
            rel_lowest,
            abs_trace,
            rel_trace,
            n_steps,
            inverse_jacobian,
        )

    def _compare_unseen(self, values: Tensor) -> None:
        """Compare what the host has not read with the best, on the device, without a wait."""
        if not self._unseen:
            return
        stop = self._stopping
        lowest = self._on_device(np.asarray(self._lowest)).to(values.dtype)
        while self._unseen:
            state, number, n_evaluations = self._unseen.popleft()
            value = values[number - 1]
            better = value < lowest
            if stop.return_final:
                self.best = state
            else:
                self.best = chosen(better, state, self.best, self._batch_dim)
            lowest = torch.where(better, value, lowest)
            if n_evaluations in stop.sample_at:
                self._sampled.append(self.best)

    def _on_device(self, numbers: Any) -> Tensor:
        return torch.from_numpy(np.array(numbers)).to(self._like.device, non_blocking=True)


def relative(residual: Any, image: Any) -> Any:
    """Return ||F(h) - h|| / ||F(h)|| from the two norms, as TorchDEQ does."""
    return residual / (image + _TINY)


def chosen(
    better: Tensor, new: Sequence[Tensor], old: Sequence[Tensor], batch_dim: int | None
) -> list[Tensor]:
    """Return a state that is `new` in the samples that are better, and `old` in the others.

    Args:
        better: the samples that are better, shape (B,).
        new: the leaves of one state.
        old: the leaves of the other.
        batch_dim: the dimension of each leaf along which samples lie; None where they are coupled.
    """
    found = []
    for leaf, before in zip(new, old, strict=True):
        shape = [1] * leaf.dim()
        if batch_dim is not None:
            shape[batch_dim] = -1
        found.append(torch.where(better.reshape(shape), leaf, before))
    return found


_FEW = 32  # samples whose numbers are looked at one by one
_BEFORE = 1e8  # what TorchDEQ's traces begin with
_TINY = 1e-9  # and what they add to a norm that they divide by
