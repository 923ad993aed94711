"""Fixed-point iteration."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._plumbing.compilation import may_compile
from .._plumbing.precision import in_full_precision
from .._plumbing.transforms import outside_vmap
from ..adjoint import Packing
from ..contract.state import State, flatten, unflatten
from .low_precision import may_solve_low
from .tracking import ForwardSolution, Stopping, Tracker


@may_compile
@outside_vmap
@torch.no_grad()
@may_solve_low()
@in_full_precision
def fixed_point(
    func: Callable[[State], State],
    start: State,
    *,
    batch_dim: int | None = 0,
    max_iter: int = 50,
    tol: float = 1e-3,
    stop_mode: str = "abs",
    tau: float = 1.0,
    sample_at: Sequence[int] = (),
    return_final: bool = False,
    check_every: int = 1,
    rounding: float = 0.0,
) -> ForwardSolution:
    """Solve h = F(h) by h <- (1 - tau) h + tau F(h).

    The iterates are those of TorchDEQ's `fixed_point_iter` up to rounding. Leaves stay as they
    are, since nothing mixes them. Takes one evaluation an iteration.

    Args:
        func: F.
        start: the initial state.
        batch_dim: the dimension of every leaf that counts samples; None where they depend on one
            another, and are solved as one.
        max_iter: the most iterations.
        tol: the residual of the damped map to reach in every sample.
        stop_mode: "abs" for ||F(h) - h||, "rel" for that over ||F(h)||.
        tau: the damping factor in (0, 1].
        sample_at: evaluations after which the best state so far is kept as well.
        return_final: whether to take all iterations and return the last state.
        check_every: the iterations from one look at the residual to the next. Only what is looked
            at can be the end of the solve, or its best state.
        rounding: of F, relative: a sample stops at a relative residual of that, too, and the solve
            where no sample has found a better state for some looks; 0 for none.
        solve_dtype: "bfloat16" or "float16" to take most of it in 16 bits, see `may_solve_low`.
        compile: whether to compile F, or a mode of `torch.compile` ("reduce-overhead" for CUDA
            graphs); False by default.

    Raises:
        ValueError: if the stop mode is unknown, or `max_iter` or `check_every` below 1.
    """
    leaves, structure = flatten(start)
    packing = Packing(leaves, batch_dim)
    like = torch.empty(packing.rows, dtype=packing.dtype, device=packing.device)
    stopping = Stopping(max_iter, tol, stop_mode, sample_at, return_final, check_every, rounding)
    # Samples go on while others do: there is no linear algebra to leave.
    tracker = Tracker(leaves, packing.batch_dim, like, stopping, keep_going=True)
    state = start
    room = _Room(leaves, packing.batch_dim, like)
    for iteration in range(max_iter):
        image, looks = flatten(func(state))[0], tracker.looks(iteration + 1)
        room.write(leaves, image, tau, looks)
        leaves = room.new
        state = unflatten(leaves, structure)
        if not looks:
            tracker.pass_over()
        elif tracker.record(leaves, room.norms(), iteration + 1):
            break
    return tracker.solution(lambda tensors: unflatten([t.clone() for t in tensors], structure))


class _Room:
    """Memory for the next state, and for the change to it.

    Args:
        leaves: of a state.
        batch_dim: the dimension of each that counts samples; None where they are coupled.
        like: a number a sample, of the dtype of the norms.

    Attributes:
        new: the leaves of the one.
    """

    def __init__(self, leaves: Sequence[Tensor], batch_dim: int | None, like: Tensor) -> None:
        dense = [torch.empty_like(leaf) for leaf in leaves]  # of their memory formats
        self._shapes = [
            ((2, *leaf.shape), (max(leaf.numel(), 1), *leaf.stride()), leaf.dtype) for leaf in dense
        ]
        self._pairs, self.new = list[Tensor](), list[Tensor]()
        self._like = like
        # Over dimensions, since a reshape would copy leaves that are in channels_last.
        self._dims = [_others(leaf.dim(), batch_dim) for leaf in leaves]

    def write(
        self, old: Sequence[Tensor], image: Sequence[Tensor], tau: float, with_change: bool
    ) -> None:
        """Write the state that follows from another, and the change if that is wanted.

        In memory of their own: F may keep what it is given.

        Args:
            old: the leaves of h.
            image: of F(h); copied, since F may return the same memory each time, as CUDA graphs do.
            tau: the damping factor.
            with_change: whether `norms` are asked for.

        Raises:
            ValueError: if F(h) has another shape than h, which a copy would expand.
        """
        device = self._like.device
        self._pairs, self.new = [], []
        for h, f, (size, strides, dtype) in zip(old, image, self._shapes, strict=True):
            pair = torch.empty_strided(size, strides, dtype=dtype, device=device)
            change, new = pair.unbind()
            self._pairs.append(pair)
            self.new.append(new)
            if f.shape != h.shape:
                raise ValueError(
                    f"func returned shape {tuple(f.shape)} for a state of {tuple(h.shape)}"
                )
            if tau == 1:
                new.copy_(f)
            else:
                torch.lerp(h, f, tau, out=new)
            if with_change:
                torch.sub(new, h, out=change)

    def norms(self) -> Tensor:
        """Return ||change|| over all leaves of each sample, and below it ||new||, shape (2, B)."""
        if len(self._pairs) == 1:
            return self._norm(self._pairs[0], self._dims[0])
        norms = [self._norm(p, dims) for p, dims in zip(self._pairs, self._dims, strict=True)]
        total: Tensor = torch.linalg.vector_norm(torch.stack(norms), dim=0)
        return total

    def _norm(self, pair: Tensor, dims: list[int]) -> Tensor:
        dtype = self._like.dtype
        if not dims:
            norm = pair.abs()
        elif pair.dtype == dtype or pair.is_complex():
            norm = torch.linalg.vector_norm(pair, dim=dims)
        else:
            norm = torch.linalg.vector_norm(pair, dim=dims, dtype=dtype)
        if norm.dim() != 2:
            norm = norm.reshape(2, -1)
        return norm if norm.dtype == dtype else norm.to(dtype)


def _others(n_dims: int, batch_dim: int | None) -> list[int]:
    """Return the dimensions of a pair of leaves that count no samples."""
    samples = None if batch_dim is None else batch_dim % n_dims
    return [dim + 1 for dim in range(n_dims) if dim != samples]
