"""Broyden's method."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .._plumbing.compilation import may_compile
from .._plumbing.lockstep import together
from .._plumbing.precision import in_full_precision
from .._plumbing.transforms import outside_vmap
from ..adjoint.inverse_estimate import InverseEstimate
from ..contract.state import State
from .low_precision import may_solve_low
from .solution import ForwardSolution, InverseJacobian
from .tracking import Rows, Stopping, Tracker


# Longer than 60 lines: two in three are its arguments, and what is said of them.
@may_compile
@outside_vmap
@together
@torch.no_grad()
@may_solve_low(beyond=1, unseen=1)
@in_full_precision
def broyden(
    func: Callable[[State], State],
    start: State,
    *,
    batch_dim: int | None = 0,
    max_iter: int = 50,
    tol: float = 1e-3,
    stop_mode: str = "abs",
    memory: int | None = None,
    keep_inverse: bool = False,
    sample_at: Sequence[int] = (),
    return_final: bool = False,
    check_every: int = 1,
    rounding: float = 0.0,
) -> ForwardSolution:
    """Solve h = F(h) by Broyden's first method with full steps, sample by sample.

    Source: Broyden 1965. The iterates are those of TorchDEQ's `broyden` up to rounding, until a
    sample reaches the tolerance, where it stops. Costs one evaluation per iteration, and one at the
    start. Memory holds one state per iteration, see `InverseEstimate`.

    Args:
        func: F.
        start: the initial state.
        batch_dim: the dimension of every leaf along which samples lie; None where samples depend on
            one another, and are solved as one.
        max_iter: the largest number of iterations.
        tol: the residual to reach in every sample.
        stop_mode: "abs" for the residual ||F(h) - h||, "rel" for that over ||F(h)||.
        memory: the number of vectors to keep; None for all. When they are used up, the estimate of
            the Jacobian begins anew (Kelley 1995, section 7.4).
        keep_inverse: whether the solution has the estimate of the inverse Jacobian. Samples that
            have converged then stay in the linear algebra, although nothing more is learned of
            them.
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
        ValueError: if the stop mode is unknown, `max_iter`, `memory` or `check_every` below 1,
            or `memory` given with `keep_inverse`.
    """
    if memory is not None and memory < 1:
        raise ValueError(f"memory={memory}; expected at least one vector")
    if memory is not None and keep_inverse:
        why = "with memory the estimate begins anew on the way; leave out one of the two"
        raise ValueError(f"memory={memory} with keep_inverse=True: {why} (TorchDEQ's LBFGS_thres)")
    rows = Rows(func, start, batch_dim)
    stopping = Stopping(max_iter, tol, stop_mode, sample_at, return_final, check_every, rounding)
    tracker = rows.tracker(stopping)
    estimate = InverseEstimate(rows.start, max_iter + 1 if memory is None else memory)
    _iterate(rows, tracker, estimate, max_iter, keep_inverse)
    if not keep_inverse:
        estimate.release()
        return tracker.solution(rows.state)
    estimate.step(tracker.moving)  # which takes the last change into account
    estimate.trim()
    return tracker.solution(rows.state, InverseJacobian(estimate, rows.packing))


def _iterate(
    rows: Rows, tracker: Tracker, estimate: InverseEstimate, max_iter: int, keep_all: bool
) -> None:
    x = rows.start
    torch.sub(rows(x), x, out=estimate.room)
    for iteration in range(max_iter):
        kept = None if keep_all else tracker.shrink()
        if kept is not None:
            estimate.select(kept)
        held, moving = tracker.held, tracker.moving
        if held is None or moving is None:
            x = x + estimate.step(moving)
        else:
            x = x.index_add(0, held, estimate.step(moving[held]))
        if estimate.is_full:
            estimate.forget()
        image = rows(x)
        if held is None:
            residual = torch.sub(image, x, out=estimate.room)
        else:
            residual = image - x
            torch.index_select(residual, 0, held, out=estimate.room)
        if not tracker.looks(iteration + 2):
            tracker.pass_over()
            continue
        norms = x.new_empty(2, len(x))
        of_residual, of_image = norms.unbind()
        torch.linalg.vector_norm(residual, dim=1, out=of_residual)
        torch.linalg.vector_norm(image, dim=1, out=of_image)
        if tracker.record([x], norms, iteration + 2):
            break
