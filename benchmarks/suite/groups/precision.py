"""Compares a training step whose forward solve is in 16 bits with one in full precision.

Both have the same budget: 22 evaluations, or as many evaluations as a tolerance needs. A processor
without units for bfloat16 does not gain from 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from .. import work
from ..contest import Contender, Contest, Ratio, Settings, available
from ..peers import evaluations, torchdeq
from ..timing import Run
from ..work import Training
from .step import FORWARD, counts, step

SOLVERS = ("broyden_fast", "anderson_fast")
DTYPES = (None, "bfloat16")
TARGET = 0.85
# The tolerance of each contest, and its largest number of evaluations. The first takes all of them.
BUDGETS = ((0.0, FORWARD), (1e-2, 60), (1e-3, 60))


def contests(settings: Settings) -> Iterator[Contest]:
    """Yield one contest per model and budget."""
    trainings: list[Callable[[], Training]] = [
        lambda layout=layout: work.mdeq_training("tiny", settings, layout)
        for layout in work.FORMATS
    ]
    trainings.append(lambda: work.transformer_training(512, 4, 64, settings))
    for training in available(trainings):
        for tol, budget in BUDGETS:
            contenders = [
                _contender(training, solver, dtype, tol, budget)
                for solver in SOLVERS
                for dtype in DTYPES
            ]
            target = TARGET if tol == 0 and "MDEQ" in training.name else None
            ratios = [
                Ratio(_name(solver, "bfloat16"), _name(solver, None), target) for solver in SOLVERS
            ]
            until = f"to {tol:g}, at most {budget}" if tol else str(budget)
            title = f"{training.name}, {until} evaluations"
            yield Contest("precision", title, contenders, ratios, repeats=9)


def _name(solver: str, dtype: str | None) -> str:
    return f"{solver} + upg" + (f", solve_dtype={dtype}" if dtype else "")


def _contender(
    training: Training, solver: str, dtype: str | None, tol: float, budget: int
) -> Contender:
    made: list[Run] = []

    def make() -> Run:
        deq = torchdeq(
            f_solver=solver,
            f_max_iter=evaluations(solver, budget),
            f_tol=tol,
            f_stop_mode="rel",
            grad="upg(k=5, lam=0.5)",
            solve_dtype=dtype,
        )
        made.append(step(training, deq))
        return made[0]

    def measure() -> dict[str, float]:
        lowered = _Lowered(training.holder)
        return {**counts(training, made[0]), **lowered.count(made[0])}

    return Contender(_name(solver, dtype), "ours", make, measure=measure)


class _Lowered:
    """Counts evaluations of f under autocast.

    Args:
        holder: the module whose `deq` evaluates f.
    """

    def __init__(self, holder: torch.nn.Module) -> None:
        self._holder, self._n = holder, 0

    def count(self, run: Run) -> dict[str, float]:
        """Return the number of such evaluations in a step."""
        run()  # sets the contender's module as `deq`

        def before(module: torch.nn.Module, args: tuple) -> tuple:
            return (self._noting(args[0]), *args[1:])

        handle = self._holder.deq.register_forward_pre_hook(before)
        self._n = 0
        try:
            run()
        finally:
            handle.remove()
        return {"f in 16 bits": self._n}

    def _noting(self, func: Callable) -> Callable:
        def evaluate(*state: torch.Tensor) -> object:
            self._n += torch.is_autocast_enabled(state[0].device.type)
            return func(*state)

        return evaluate
