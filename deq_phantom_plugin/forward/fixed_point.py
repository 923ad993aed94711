"""Fixed-point iteration."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._plumbing.compilation import may_compile
from .._plumbing.lockstep import together
from .._plumbing.precision import in_full_precision
from .._plumbing.transforms import outside_vmap
from ..adjoint import batch_size, wide_dtype
from ..contract.state import State, flatten, unflatten
from .low_precision import may_solve_low
from .solution import ForwardSolution
from .tracking import Stopping, Tracker


# Longer than 60 lines: two in three are its arguments, and what is said of them.
@may_compile
@outside_vmap
@together
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

    The iterates are those of TorchDEQ's `fixed_point_iter` up to rounding. Leaves are not packed
    into one matrix, since nothing mixes them. Costs one evaluation per iteration.

    Args:
        func: F.
        start: the initial state.
        batch_dim: the dimension of every leaf along which samples lie; None where samples depend on
            one another, and are solved as one.
        max_iter: the largest number of iterations.
        tol: the residual of the damped map to reach in every sample.
        stop_mode: "abs" for the residual ||F(h) - h||, "rel" for that over ||F(h)||.
        tau: the damping factor in (0, 1].
        sample_at: numbers of evaluations after which the best state so far is kept as well.
        return_final: whether to take all iterations and return the last state.
        check_every: the iterations from one look at the residual to the next. Only a state that is
            looked at can be the end of the solve, or its best state.
        rounding: the relative rounding of F; 0 for none. A sample also stops at a relative residual
            of this. The solve also stops where no sample has found a better state for some looks.
        solve_dtype: "bfloat16" or "float16" to take most of it in 16 bits, see `may_solve_low`.
        compile: whether to compile F, or a mode of `torch.compile` ("reduce-overhead" for CUDA
            graphs); False by default.

    Raises:
        ValueError: if the stop mode is unknown, or `max_iter` or `check_every` below 1.
    """
    leaves, structure = flatten(start)
    n_samples = batch_size(leaves, batch_dim)
    dim = None if n_samples is None else batch_dim
    rows = 1 if n_samples is None else n_samples
    like = torch.empty(rows, dtype=wide_dtype(leaves), device=leaves[0].device)
    stopping = Stopping(max_iter, tol, stop_mode, sample_at, return_final, check_every, rounding)
    # Samples go on while others do: there is no linear algebra to leave.
    tracker = Tracker(leaves, dim, like, stopping, keep_going=True)
    state = start
    rooms = [_Room(leaf, dim, like) for leaf in leaves]
    for iteration in range(max_iter):
        images, looks = flatten(func(state))[0], tracker.looks(iteration + 1)
        old, leaves = leaves, []
        for room, h, image in zip(rooms, old, images, strict=True):
            leaves.append(room.write(h, image, tau, looks))
        state = unflatten(leaves, structure)
        if not looks:
            tracker.pass_over()
        elif tracker.record(leaves, _norms(rooms), iteration + 1):
            break
    return tracker.solution(lambda tensors: unflatten([t.clone() for t in tensors], structure))


class _Room:
    """Memory for a leaf of the next state, and for the change from the last state to it.

    Args:
        leaf: a leaf of a state.
        batch_dim: the dimension along which samples lie; None where they are coupled.
        like: a tensor of one number per sample, of the dtype of the norms.
    """

    def __init__(self, leaf: Tensor, batch_dim: int | None, like: Tensor) -> None:
        self._shape, self._norms_dtype, self._device = leaf.shape, like.dtype, like.device
        dense = torch.empty_like(leaf)  # of its memory format
        self._size = 2, *dense.shape
        self._strides, self._dtype = (max(dense.numel(), 1), *dense.stride()), dense.dtype
        # Over dimensions, since a reshape would copy leaves that are in channels_last.
        samples = None if batch_dim is None else batch_dim % leaf.dim()
        self._dims = tuple(dim + 1 for dim in range(leaf.dim()) if dim != samples)
        self._converts = leaf.dtype != like.dtype and not leaf.is_complex()
        self._pair = dense

    def write(self, h: Tensor, image: Tensor, tau: float, with_change: bool) -> Tensor:
        """Return the next leaf, in memory of its own, since F may keep what it is given.

        Args:
            h: the leaf.
            image: the leaf of F(h). It is copied, since F may return the same memory each time, as
                CUDA graphs do.
            tau: the damping factor.
            with_change: whether `norm` will be asked for.

        Raises:
            ValueError: if F(h) has another shape than h, which a copy would expand.
        """
        if image.shape != self._shape:
            raise ValueError(
                f"func returned shape {tuple(image.shape)} for a state of {tuple(self._shape)}; "
                "it must map a state to one of the same shape"
            )
        self._pair = torch.empty_strided(
            self._size, self._strides, dtype=self._dtype, device=self._device
        )
        change, new = self._pair.unbind()
        if tau == 1:
            new.copy_(image)
        else:
            torch.lerp(h, image, tau, out=new)
        if with_change:
            torch.sub(new, h, out=change)
        return new

    def norm(self) -> Tensor:
        """Return ||change|| and ||new leaf|| per sample, shape (2, B)."""
        dtype = self._norms_dtype if self._converts else None
        if self._dims:
            norm: Tensor = torch.linalg.vector_norm(self._pair, dim=self._dims, dtype=dtype)
        else:
            norm = self._pair.abs()
        if norm.dim() != 2:
            norm = norm.reshape(2, -1)
        return norm if norm.dtype == self._norms_dtype else norm.to(self._norms_dtype)


def _norms(rooms: Sequence[_Room]) -> Tensor:
    """Return the norms over all leaves."""
    if len(rooms) == 1:
        return rooms[0].norm()
    total: Tensor = torch.linalg.vector_norm(torch.stack([room.norm() for room in rooms]), dim=0)
    return total
