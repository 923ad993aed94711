"""Anderson acceleration."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._plumbing.compilation import may_compile
from .._plumbing.precision import in_full_precision
from .._plumbing.transforms import outside_vmap
from ..contract.state import State
from .low_precision import may_solve_low
from .tracking import ForwardSolution, Rows, Stopping, Tracker


@may_compile
@outside_vmap
@torch.no_grad()
@may_solve_low(unseen=2)
@in_full_precision
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
    check_every: int = 1,
    rounding: float = 0.0,
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
        check_every: the iterations from one look at the residual to the next. Only what is looked
            at can be the end of the solve, or its best state.
        rounding: of F, relative: a sample stops at a relative residual of that, too, and the solve
            where no sample has found a better state for some looks; 0 for none.
        solve_dtype: "bfloat16" or "float16" to take most of it in 16 bits, see `may_solve_low`.
        compile: whether to compile F, or a mode of `torch.compile` ("reduce-overhead" for CUDA
            graphs); False by default.

    Raises:
        ValueError: if the stop mode is unknown, `m` is below 2, `max_iter` below 3 or
            `check_every` below 1.
    """
    if m < 2 or max_iter < 3:
        raise ValueError(f"m={m}, max_iter={max_iter}; expected at least m=2 and max_iter=3")
    rows = Rows(func, start, batch_dim)
    stopping = Stopping(
        max_iter - 2, tol, stop_mode, sample_at, return_final, check_every, rounding
    )
    tracker = rows.tracker(stopping, first_step=3)
    _iterate(rows, tracker, _Mixer(rows.start, m, lam, tau), stopping)
    return tracker.solution(lambda tensors: rows.state([t.clone() for t in tensors]))


def _iterate(rows: Rows, tracker: Tracker, mixer: _Mixer, stopping: Stopping) -> None:
    x = rows.start
    for _ in range(2):
        change, new = mixer.room.unbind()
        torch.sub(rows(x, new), x, out=change)
        mixer.take()
        x = new.clone()  # F may keep what it is given, and this place is used again
    states: list[list[Tensor]] = [[x] for _ in range(mixer.size)]
    for iteration in range(stopping.max_iter):
        kept = tracker.shrink()
        if kept is not None:
            mixer.select(kept)
        x, held, slot = _moved(x, mixer.mixture(), tracker), tracker.held, mixer.slot
        pair = mixer.room if held is None else x.new_empty(2, *x.shape)
        tracker.let_go(states[slot])
        change, new = pair.unbind()
        torch.sub(rows(x, new), x, out=change)
        if held is not None:
            torch.index_select(pair, 1, held, out=mixer.room)
        mixer.take()
        states[slot] = [new]
        if not tracker.looks(iteration + 3):
            tracker.pass_over()
            continue
        norms = torch.linalg.vector_norm(pair, dim=2)
        if tracker.record(states[slot], norms, iteration + 3):
            break


def _moved(x: Tensor, mixture: Tensor, tracker: Tracker) -> Tensor:
    """Return the mixture in the samples that still move."""
    held, moving = tracker.held, tracker.moving
    if moving is None:
        return mixture
    if held is None:
        return torch.where(moving[:, None], mixture, x)
    return x.index_copy(0, held, torch.where(moving[held, None], mixture, x[held]))


class _Mixer:
    """The last states, and the combination of least residual that adds up to one.

    Attributes:
        size: how many they are at most.
        slot: where the next goes, in the oldest's place.
    """

    def __init__(self, like: Tensor, m: int, lam: float, tau: float) -> None:
        batch, size = like.shape
        self.size, self.slot, self._count = m, 0, 0
        self._kept = like.new_empty(2, m, batch, size)  # residuals, images; written before read
        # That the weights add up to one is the first row, its multiplier the first column.
        self._system = like.new_ones(batch, m + 1, m + 1)
        self._system[:, 0, 0] = 0
        self._right = like.new_zeros(m + 1)
        self._right[0] = 1
        self._ridge = lam * torch.eye(m, dtype=like.dtype, device=like.device)
        self._known: dict[tuple[int, int], _Views] = {}
        self._tau = tau

    @property
    def room(self) -> Tensor:
        """Where to write a residual and an image before `take`, shape (2, B, D)."""
        return self._kept[:, self.slot]

    def take(self) -> None:
        """Take what was written into account."""
        slot = self.slot
        self._count = max(self._count, slot + 1)
        views = self._views(slot, self._count)
        row = torch.baddbmm(views.ridge, views.newest, views.residuals.mT)
        views.row.copy_(row)
        views.column.copy_(row.mT)
        self.slot = (slot + 1) % self.size

    def mixture(self) -> Tensor:
        """Return it, shape (B, D)."""
        views = self._views((self.slot - 1) % self.size, self._count)
        # The variant that does not wait for the device to report singular matrices.
        solved, _ = torch.linalg.solve_ex(views.system, views.right)
        weights = solved[:, 1:].mT
        mixture = torch.bmm(weights, views.images).squeeze(1)
        if self._tau != 1:
            mixed = torch.bmm(weights, views.residuals).squeeze(1)
            mixture = mixture - (1 - self._tau) * mixed
        return mixture

    def _views(self, slot: int, n: int) -> _Views:
        """Return the parts that are used, which are the same again `size` iterations later."""
        known = self._known.get((slot, n))
        if known is None:
            known = self._known[slot, n] = _Views(
                self._kept, self._system, self._ridge, self._right, slot, n
            )
        return known

    def select(self, rows: Tensor) -> None:
        self._kept = self._kept.index_select(2, rows)
        self._system, self._known = self._system[rows], {}


class _Views:
    """Parts of what a mixer keeps: of n states, of which that in `slot` is the newest.

    Attributes:
        residuals: shape (B, n, D).
        images: the same.
        newest: the residual of the newest, shape (B, 1, D).
        system: the Gram matrix, bordered by ones, shape (B, n + 1, n + 1).
        row: of the newest in it, shape (B, 1, n).
        column: the same, shape (B, n, 1).
        ridge: the row of what is added to it.
        right: the right-hand side of the system, shape (B, n + 1, 1).
    """

    def __init__(
        self, kept: Tensor, system: Tensor, ridge: Tensor, right: Tensor, slot: int, n: int
    ) -> None:
        # One view each where slices would be two or three, which take as long as the work where
        # states are small.
        _, m, batch, size = kept.shape
        states, strides, place = (batch, n, size), (size, batch * size, 1), slot * batch * size
        self.residuals = kept.as_strided(states, strides, 0)
        self.images = kept.as_strided(states, strides, m * batch * size)
        self.newest = kept.as_strided((batch, 1, size), strides, place)
        side = m + 1
        strides, place = (side * side, side, 1), (slot + 1) * side + 1
        self.system = system.as_strided((batch, n + 1, n + 1), strides, 0)
        self.row = system.as_strided((batch, 1, n), strides, place)
        self.column = system.as_strided((batch, n, 1), strides, side + slot + 1)
        self.ridge = ridge.as_strided((batch, 1, n), (0, m, 1), slot * m)
        self.right = right.as_strided((batch, n + 1, 1), (0, 1, 1), 0)
