"""Anderson acceleration."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._plumbing.compilation import may_compile
from .._plumbing.precision import in_full_precision
from .._plumbing.transforms import outside_vmap
from ..contract.state import State
from .tracking import ForwardSolution, Rows, Stopping, Tracker


@may_compile
@outside_vmap
@in_full_precision
@torch.no_grad()
def anderson(
    func: Callable[[State], State],
    start: State,
    *,
    batch_dim: int | None = 0,
    max_iter: int = 50,
    tol: float = 1e-3,
    stop_mode: str = "abs",
    m: int = 6,
    lam: float = 1e-4,
    tau: float = 1.0,
    sample_at: Sequence[int] = (),
    return_final: bool = False,
) -> ForwardSolution:
    """Solve h = F(h) by Anderson acceleration (Anderson 1965; Walker & Ni 2011), sample by sample.

    The iterates are those of TorchDEQ's `anderson` up to rounding, until a sample reaches the
    tolerance, where it stops. Takes one evaluation an iteration, `max_iter` in all; keeps 2 `m`
    vectors and reads each once an iteration, since only a row of their Gram matrix is new.

    Args:
        func: F.
        start: the initial state.
        batch_dim: the dimension of every leaf that counts samples; None where they depend on one
            another, and are solved as one.
        max_iter: the most evaluations, the two before the first mixing included.
        tol: the residual to reach in every sample.
        stop_mode: "abs" for ||F(h) - h||, "rel" for that over ||F(h)||.
        m: the states that are mixed.
        lam: what is added to the diagonal of the Gram matrix.
        tau: how much of F(h) there is in the mixture; the rest is h.
        sample_at: evaluations after which the best state so far is kept as well.
        return_final: whether to take all iterations and return the last state.
        compile: whether to compile F, or a mode of `torch.compile` ("reduce-overhead" for CUDA
            graphs); False by default.

    Raises:
        ValueError: if the stop mode is unknown, or `m` is below 2 or `max_iter` below 3.
    """
    if m < 2 or max_iter < 3:
        raise ValueError(f"m={m}, max_iter={max_iter}; expected at least m=2 and max_iter=3")
    rows = Rows(func, start, batch_dim)
    stopping = Stopping(max_iter - 2, tol, stop_mode, sample_at, return_final)
    tracker = rows.tracker(stopping, first_step=3)
    _iterate(rows, tracker, _Mixer(rows.start, m, lam, tau), max_iter - 2)
    return tracker.solution(rows.state)


def _iterate(rows: Rows, tracker: Tracker, mixer: _Mixer, max_iter: int) -> None:
    x = rows.start
    image = rows.kept(x)
    mixer.keep(image, image - x)
    x, image = image, rows.kept(image)
    mixer.keep(image, image - x)
    for iteration in range(max_iter):
        kept = tracker.shrink()
        if kept is not None:
            mixer.select(kept)
        mixture, active, held = mixer.mixture(), tracker.active, tracker.held
        if held is None:
            x = torch.where(active[:, None], mixture, x)
        else:
            x = x.index_copy(0, held, torch.where(active[held, None], mixture, x[held]))
        image = rows.kept(x)
        residual = image - x
        if held is None:
            mixer.keep(image, residual)
        else:
            mixer.keep(image[held], residual[held])
        norms = torch.linalg.vector_norm(residual, dim=1), torch.linalg.vector_norm(image, dim=1)
        if tracker.record([image], *norms, iteration + 3):
            break


class _Mixer:
    """The last states, and the combination of least residual that adds up to one."""

    def __init__(self, like: Tensor, m: int, lam: float, tau: float) -> None:
        batch, size = like.shape
        self._images = like.new_empty(batch, m, size)  # written before read
        self._residuals = like.new_empty(batch, m, size)
        self._gram = like.new_zeros(batch, m, m)
        self._lam, self._tau = lam, tau
        self._slot, self._count, self._most = 0, 0, m

    def keep(self, image: Tensor, residual: Tensor) -> None:
        slot, self._slot = self._slot, (self._slot + 1) % self._most
        self._images[:, slot], self._residuals[:, slot] = image, residual
        self._count = max(self._count, slot + 1)
        row = (residual[:, None] @ self._residuals[:, : self._count].mT).squeeze(1)
        self._gram[:, slot, : self._count] = self._gram[:, : self._count, slot] = row

    def mixture(self) -> Tensor:
        n = self._count
        ridge = self._lam * torch.eye(n, dtype=self._gram.dtype, device=self._gram.device)
        ones = torch.ones_like(self._gram[:, :n, :1])
        # The variant that does not wait for the device to report singular matrices.
        solved, _ = torch.linalg.solve_ex(self._gram[:, :n, :n] + ridge, ones)
        weights = (solved / solved.sum(dim=1, keepdim=True)).mT
        mixture: Tensor = (weights @ self._images[:, :n]).squeeze(1)
        if self._tau != 1:
            mixture = mixture - (1 - self._tau) * (weights @ self._residuals[:, :n]).squeeze(1)
        return mixture

    def select(self, rows: Tensor) -> None:
        self._images, self._residuals = self._images[rows], self._residuals[rows]
        self._gram = self._gram[rows]
