"""Fixed-point iteration."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._plumbing.compilation import may_compile
from .._plumbing.precision import in_full_precision
from .._plumbing.transforms import outside_vmap
from ..adjoint import Packing
from ..contract.state import State, damped_step, flatten, unflatten
from .tracking import ForwardSolution, Stopping, Tracker


@may_compile
@outside_vmap
@in_full_precision
@torch.no_grad()
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
        compile: whether to compile F, or a mode of `torch.compile` ("reduce-overhead" for CUDA
            graphs); False by default.

    Raises:
        ValueError: if the stop mode is unknown, or `max_iter` below 1.
    """
    leaves, structure = flatten(start)
    packing = Packing(leaves, batch_dim)
    like = torch.zeros(packing.rows, dtype=packing.dtype, device=packing.device)
    dim = packing.batch_dim or 0
    stopping = Stopping(max_iter, tol, stop_mode, sample_at, return_final)
    # Samples go on while others do: there is no linear algebra to leave.
    tracker = Tracker(_moved(leaves, dim, 0), like, stopping, keep_going=True)
    state = start
    for iteration in range(max_iter):
        image = damped_step(func, state, tau)
        # Copied, since F may return the same memory each time, as CUDA graphs do.
        new, old = [leaf.clone() for leaf in flatten(image)[0]], flatten(state)[0]
        change = [a - b for a, b in zip(new, old, strict=True)]
        residual = _norm(_moved(change, dim, 0), like)
        state = unflatten(new, structure)
        moved = _moved(new, dim, 0)
        if tracker.record(moved, residual, _norm(moved, like), iteration + 1):
            break
    return tracker.solution(lambda leaves: unflatten(_moved(leaves, 0, dim), structure))


def _moved(leaves: Sequence[Tensor], source: int, target: int) -> list[Tensor]:
    """Return leaves whose samples lie along another dimension."""
    return [leaf.movedim(source, target) for leaf in leaves] if source != target else list(leaves)


def _norm(leaves: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return the norm over all leaves of each sample, shape (B,)."""
    norms = [_norm_of(leaf, like) for leaf in leaves]
    total: Tensor = norms[0]
    if len(norms) > 1:
        total = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    return total


def _norm_of(leaf: Tensor, like: Tensor) -> Tensor:
    norm: Tensor
    if leaf.dim() > 1 and len(leaf) == len(like):
        # Over dimensions, since a reshape would copy leaves that are in channels_last.
        norm = torch.linalg.vector_norm(leaf, dim=tuple(range(1, leaf.dim())))
    elif len(like) == 1:
        norm = torch.linalg.vector_norm(leaf).reshape(1)
    else:
        norm = leaf.abs()
    return norm if norm.dtype == like.dtype else norm.to(like.dtype)
