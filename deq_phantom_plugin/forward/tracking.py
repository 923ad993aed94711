"""What all forward solvers share: residuals, the best state so far, and when to stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from .._plumbing.late_read import LateRead
from ..adjoint import Packing
from ..adjoint.inverse_estimate import InverseEstimate
from ..adjoint.progress import choose_leaves
from ..contract.state import State, flatten, unflatten

STOP_MODES = ("abs", "rel")


@dataclass(frozen=True)
class InverseJacobian:
    """What a quasi-Newton solve learned of (I - J)^-1 on its way.

    Attributes:
        estimate: for rows of a packing.
        packing: between rows and the leaves of the state.
    """

    estimate: InverseEstimate
    packing: Packing

    def transposed(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Return an estimate of (I - J^T)^-1 v, for and as the leaves of a state."""
        return self.packing.unpack(self.estimate.transposed(self.packing.pack(leaves)))


@dataclass(frozen=True)
class ForwardSolution:
    """What a forward solver found.

    Attributes:
        state: the state of lowest residual, sample by sample; like the one that was given.
        sampled: the best states after the evaluations that were asked for.
        abs_lowest: ||F(h) - h|| of each sample, shape (B,).
        rel_lowest: ||F(h) - h|| / ||F(h)|| of each sample, shape (B,).
        abs_trace: the residual after each iteration, shape (B, N + 1); 1e8 before the first.
        rel_trace: the same, relative.
        n_steps: the iteration in which the lowest residual was found, shape (B,).
        inverse_jacobian: of a quasi-Newton solve that was asked to keep it.
    """

    state: State
    sampled: list[State]
    abs_lowest: Tensor
    rel_lowest: Tensor
    abs_trace: Tensor
    rel_trace: Tensor
    n_steps: Tensor
    inverse_jacobian: InverseJacobian | None = None


class Rows:
    """F on a matrix of a row a sample, for solvers that mix states by inner products.

    Attributes:
        packing: between rows and leaves.
        start: the initial state, shape (B, D).
    """

    def __init__(
        self, func: Callable[[State], State], start: State, batch_dim: int | None = 0
    ) -> None:
        leaves, self._structure = flatten(start)
        self._func = func
        self.packing = Packing([leaf.detach() for leaf in leaves], batch_dim)
        self.start = self.packing.pack(leaves)

    def __call__(self, rows: Tensor) -> Tensor:
        """Return F(h) as rows, for h as rows; perhaps in the memory that F returned."""
        return self.packing.pack(flatten(self._func(self.state([rows])))[0])

    def kept(self, rows: Tensor) -> Tensor:
        """Return F(h) in memory of its own: F may return the same each time, as CUDA graphs do."""
        leaves = flatten(self._func(self.state([rows])))[0]
        packed = self.packing.pack(leaves)
        if is_functorch_wrapped_tensor(packed):  # which has no address to look at
            return packed.clone()
        return packed.clone() if packed.data_ptr() == leaves[0].data_ptr() else packed

    def state(self, rows: Sequence[Tensor]) -> State:
        """Return rows, a matrix alone in a sequence, as a state."""
        return unflatten(self.packing.unpack(rows[0]), self._structure)

    def tracker(self, stopping: Stopping, first_step: int = 1) -> Tracker:
        """Return what follows a solve on them."""
        like = self.start.new_zeros(len(self.start))
        return Tracker([self.start], like, stopping, first_step=first_step)


class Stopping(NamedTuple):
    """When a solve stops.

    Attributes:
        max_iter: the iterations that it may take; traces are filled up to it.
        tol: the residual to reach in every sample.
        mode: whether that is "abs", ||F(h) - h||, or "rel", that over ||F(h)||.
        sample_at: evaluations after which the best state so far is kept as well.
        return_final: whether the last state is taken for the best, and nothing stops early.
    """

    max_iter: int
    tol: float
    mode: str
    sample_at: Sequence[int]
    return_final: bool


class Tracker:
    """Follows a solve sample by sample, and remembers the best.

    Samples that reach the tolerance stop, unless told otherwise, and so do those that became NaN or
    infinite. The host learns of it one iteration late where it would have to wait for the
    device, so that there is always work queued.

    Args:
        start: the tensors of the initial state.
        like: a number a sample, of the dtype and device of the norms.
        stopping: when the solve stops.
        first_step: the number of the first iteration.
        keep_going: whether samples go on for as long as others do.

    Attributes:
        active: the samples that still move, shape (B,).
        held: indices of those that a solver's linear algebra works on; all if None.
        best: the tensors of the best state.

    Raises:
        ValueError: if the stop mode is unknown, or no iteration allowed.
    """

    def __init__(
        self,
        start: Sequence[Tensor],
        like: Tensor,
        stopping: Stopping,
        *,
        first_step: int = 1,
        keep_going: bool = False,
    ) -> None:
        if stopping.mode not in STOP_MODES:
            raise ValueError(f"stop_mode={stopping.mode!r}; expected 'abs' or 'rel'")
        max_iter = stopping.max_iter
        if max_iter < 1:
            raise ValueError(f"max_iter allows for {max_iter} iterations; expected at least 1")
        self._stopping, self._keep_going = stopping, keep_going or stopping.return_final
        self._sampled = list[list[Tensor]]()
        self._start = torch.full_like(like, 1e8)
        self._lowest, self._norms = self._start, list[tuple[Tensor, Tensor]]()
        self._first_step = first_step
        self._late = LateRead(like.device)
        self.best = list(start)
        self.active = torch.ones_like(like, dtype=torch.bool)
        self.held: Tensor | None = None
        self._n_active = len(like)

    def record(
        self, state: Sequence[Tensor], residual: Tensor, image: Tensor, n_evaluations: int
    ) -> bool:
        """Take note of an iterate; return whether the solve is over.

        Args:
            state: its tensors, samples along dimension 0; not changed afterwards.
            residual: ||F(h) - h|| of each sample, shape (B,).
            image: ||F(h)|| of each sample, shape (B,).
            n_evaluations: evaluations of F so far.
        """
        self._norms.append((residual, image))
        value = residual if self._stopping.mode == "abs" else _relative(residual, image)
        better = value < self._lowest
        self._lowest, *best = choose_leaves(better, [value, *state], [self._lowest, *self.best])
        self.best = list(state) if self._stopping.return_final else best
        if n_evaluations in self._stopping.sample_at:
            self._sampled.append(self.best)
        short = self._lowest >= self._stopping.tol
        if not self._keep_going:
            self.active = self.active & short & torch.isfinite(residual)
        left = self._late.read(torch.count_nonzero(short if self._keep_going else self.active))
        if left is None:
            return False
        if not self._keep_going:
            self._n_active = left
        return left == 0 and not self._stopping.return_final

    def shrink(self) -> Tensor | None:
        """Return which of the samples in `held` are still held, once half of them are done."""
        moving = self.active if self.held is None else self.active[self.held]
        if self._n_active > len(moving) // 2:
            return None
        # Sorted rather than searched for: how many there are, the host knows already.
        kept = torch.argsort(moving, descending=True, stable=True)[: self._n_active]
        self.held = kept if self.held is None else self.held[kept]
        return kept

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
        stop = self._stopping
        if stop.sample_at and not self._sampled:
            self._sampled.append(self.best)
        residuals, images = (torch.stack(norms, dim=1) for norms in zip(*self._norms, strict=True))
        traces = {"abs": residuals, "rel": _relative(residuals, images)}
        lowest = {
            mode: trace[:, -1] if stop.return_final else _without_nan(trace).amin(dim=1)
            for mode, trace in traces.items()
        }
        when = _without_nan(traces[stop.mode]).argmin(dim=1)
        if stop.return_final:
            when = torch.full_like(when, len(self._norms) - 1)
        missing = stop.max_iter - len(self._norms)
        filled = {
            mode: torch.cat(
                [self._start[:, None], trace, lowest[mode][:, None].expand(-1, missing)], dim=1
            )
            for mode, trace in traces.items()
        }
        return ForwardSolution(
            state=restore(self.best),
            sampled=[restore(tensors) for tensors in self._sampled],
            abs_lowest=lowest["abs"],
            rel_lowest=lowest["rel"],
            abs_trace=filled["abs"],
            rel_trace=filled["rel"],
            n_steps=(when + self._first_step).to(self._start.dtype),
            inverse_jacobian=inverse_jacobian,
        )


def _relative(residual: Tensor, image: Tensor) -> Tensor:
    return residual / (image + 1e-9)


def _without_nan(trace: Tensor) -> Tensor:
    return torch.nan_to_num(trace, nan=torch.inf, posinf=torch.inf)
