"""Anderson acceleration."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._plumbing.compilation import may_compile
from .._plumbing.lockstep import together
from .._plumbing.precision import in_full_precision
from .._plumbing.transforms import outside_vmap
from .._plumbing.workspaces import Workspace, Workspaces
from ..contract.state import State
from .low_precision import may_solve_low
from .solution import ForwardSolution
from .tracking import Rows, Stopping, Tracker


@may_compile
@outside_vmap
@together
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
    """Solve h = F(h) by Anderson acceleration, sample by sample.

    Source: Anderson 1965; Walker & Ni 2011. The iterates are those of TorchDEQ's `anderson` up to
    rounding, until a sample reaches the tolerance, where it stops. Costs one evaluation per
    iteration. Memory holds 2 `m` states.

    Args:
        func: F.
        start: the initial state.
        batch_dim: the dimension of every leaf along which samples lie; None where samples depend on
            one another, and are solved as one.
        max_iter: the largest number of evaluations, with the two before the first mixing.
        tol: the residual to reach in every sample.
        stop_mode: "abs" for the residual ||F(h) - h||, "rel" for that over ||F(h)||.
        m: the number of states that are mixed.
        lam: what is added to the diagonal of the Gram matrix.
        tau: the share of F(h) in the mixture; the rest is h.
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
    mixer = _Mixer(rows.start, m, lam, tau)
    _iterate(rows, tracker, mixer, stopping)
    solution = tracker.solution(lambda tensors: rows.state([t.clone() for t in tensors]))
    mixer.release()
    return solution


def _iterate(rows: Rows, tracker: Tracker, mixer: _Mixer, stopping: Stopping) -> None:
    x = rows.start
    for _ in range(2):
        _, change, new = mixer.room
        torch.sub(rows(x, new), x, out=change)
        mixer.take()
        x = new.clone()  # F may keep what it is given, and this place is used again
    states: list[list[Tensor]] = [[x] for _ in range(mixer.size)]
    for iteration in range(stopping.max_iter):
        kept = tracker.shrink()
        if kept is not None:
            mixer.select(kept)
        x, held, slot = _moved(x, mixer.mixture(), tracker), tracker.held, mixer.slot
        tracker.let_go(states[slot])
        pair, change, new = mixer.room if held is None else _room(x.new_empty(2, *x.shape))
        torch.sub(rows(x, new), x, out=change)
        if held is not None:
            torch.index_select(pair, 1, held, out=mixer.room[0])
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


def _room(pair: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a pair of a residual and an image, and each of the two."""
    change, new = pair.unbind()
    return pair, change, new


class _Mixer:
    """The last states, and their combination of least residual.

    With residuals r_i = F(h_i) - h_i of n states, the weights w solve

        min |sum_i w_i r_i|^2 + lam |w|^2,    sum_i w_i = 1.

    With the Gram matrix G_ij = r_i . r_j, shape (n, n), and a multiplier, that is one system of
    shape (n + 1, n + 1) per sample. An iteration changes one row and one column of it:

        [0  1^T      ] [mu]   [1]
        [1  G + lam I] [w ] = [0].

    Attributes:
        size: the largest number of states.
        slot: the place of the next state, which is that of the oldest.
    """

    def __init__(self, like: Tensor, m: int, lam: float, tau: float) -> None:
        self.size, self.slot, self._count = m, 0, 0
        self._lam, self._tau = lam, tau
        self._memory = _memories.take(like, m)
        self._memory.add(lam)

    @property
    def room(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where to write a residual and an image before `take`: both, (2, B, D), and each."""
        return self._memory.rooms[self.slot]

    def take(self) -> None:
        """Take what was written into account."""
        slot = self.slot
        self._count = max(self._count, slot + 1)
        views = self._memory.views(slot, self._count)
        torch.baddbmm(views.ridge, views.newest, views.residuals_as_columns, out=views.products)
        views.row.copy_(views.products)
        views.column.copy_(views.products)
        self.slot = (slot + 1) % self.size

    def mixture(self) -> Tensor:
        """Return sum_i w_i (tau F(h_i) + (1 - tau) h_i), shape (B, D)."""
        views = self._memory.views((self.slot - 1) % self.size, self._count)
        # The variant that does not wait for the device to report singular matrices.
        solved, _ = torch.linalg.solve_ex(views.system, views.right)
        weights = solved[:, 1:].mT
        mixture = torch.bmm(weights, views.images).squeeze(1)
        if self._tau != 1:
            mixed = torch.bmm(weights, views.residuals).squeeze(1)
            mixture = mixture - (1 - self._tau) * mixed
        return mixture

    def select(self, rows: Tensor) -> None:
        """Keep the samples of these indices only."""
        before = self._memory
        self._memory = _memories.take(
            before.kept.new_empty(len(rows), before.kept.shape[-1]), self.size
        )
        self._memory.add(self._lam)
        torch.index_select(before.kept, 2, rows, out=self._memory.kept)
        torch.index_select(before.system, 0, rows, out=self._memory.system)

    def release(self) -> None:
        """Give the memory to the next solve; this one is not to be used any more."""
        _memories.give_back(self._memory)


class _Memory(Workspace):
    """What a mixer keeps of m states. Only slots that were written are read.

    Attributes:
        kept: residuals and images, shape (2, m, B, D).
        rooms: for each slot its residual and image, shape (2, B, D), and each of the two.
        system: the Gram matrix of the residuals, bordered by ones, shape (B, m + 1, m + 1).
        right: the right-hand side of the system, shape (m + 1,).
        ridge: what is added to the Gram matrix, shape (m, m).
        products: room for a row of it, B m numbers.
    """

    def __init__(self, like: Tensor, m: int) -> None:
        batch, size = like.shape
        self.kept = like.new_empty(2, m, batch, size)
        self.rooms = [_room(pair) for pair in self.kept.unbind(1)]
        self.system = like.new_ones(batch, m + 1, m + 1)
        self.system[:, 0, 0] = 0
        self.right = like.new_zeros(m + 1)
        self.right[0] = 1
        self.ridge = like.new_zeros(m, m)
        self.products = like.new_empty(batch * m)
        self._lam = 0.0
        self._known: dict[tuple[int, int], _Views] = {}

    def add(self, lam: float) -> None:
        """Let lam be what is added to the diagonal of the Gram matrix."""
        if lam != self._lam:
            self.ridge.fill_diagonal_(lam)
            self._lam = lam

    def views(self, slot: int, n: int) -> _Views:
        """Return the parts that are used, which are the same again `m` iterations later."""
        known = self._known.get((slot, n))
        if known is None:
            known = self._known[slot, n] = _Views(self, slot, n)
        return known


_memories = Workspaces(_Memory)


class _Views:
    """Parts of what a mixer keeps, for n states, of which the one in `slot` is the newest.

    Attributes:
        residuals: shape (B, n, D).
        residuals_as_columns: shape (B, D, n).
        images: shape (B, n, D).
        newest: the residual of the newest, shape (B, 1, D).
        products: room for its products with all, shape (B, 1, n).
        system: the bordered Gram matrix, shape (B, n + 1, n + 1).
        row: of the newest in it, shape (B, 1, n).
        column: the same, transposed.
        ridge: the row of what is added to it, shape (B, 1, n).
        right: the right-hand side of the system, shape (B, n + 1, 1).
    """

    def __init__(self, memory: _Memory, slot: int, n: int) -> None:
        residuals, images = memory.kept.movedim(2, 1)[:, :, :n]
        batch = len(residuals)
        self.residuals, self.images = residuals, images
        self.residuals_as_columns = residuals.mT
        self.newest = residuals[:, slot : slot + 1]
        self.products = memory.products[: batch * n].view(batch, 1, n)
        self.system = memory.system[:, : n + 1, : n + 1]
        self.row = self.system[:, slot + 1 : slot + 2, 1:]
        self.column = self.system[:, 1:, slot + 1 : slot + 2].mT
        self.ridge = memory.ridge[slot, :n].expand(batch, 1, n)
        self.right = memory.right[: n + 1, None].expand(batch, n + 1, 1)
