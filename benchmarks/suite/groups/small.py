"""Times a step (solve, attach, differentiate) whose F takes microseconds, so overhead dominates."""

from __future__ import annotations

from collections.abc import Iterator

from .. import work
from ..accounting import launches
from ..contest import Contender, Contest, Ratio, Settings
from ..peers import Silva, evaluations, solve_floor, torchdeq, upg_floor
from ..timing import Run
from ..work import Problem
from .synthetic import solved

N, K = 20, 5  # evaluations of the solve, and of the gradient
SIZES = ((16, 1), (128, 1), (128, 32), (1024, 8))
LOOP = "the loop by hand"
# TorchDEQ's name of a solver -> our name, silva-networks' name.
SOLVERS = {
    "fixed_point_iter": ("fixed_point_fast", "picard"),
    "anderson": ("anderson_fast", "anderson"),
    "broyden": ("broyden_fast", "broyden"),
}
# Targets of our step: over TorchDEQ's at batch 1 (TARGETS) and in batches (BATCHED), and over the
# loop by hand at D=1024 (LARGE).
TARGETS = {"fixed_point_iter": 0.40, "anderson": 0.45, "broyden": 0.42}
BATCHED, LARGE = 0.50, {"fixed_point_iter": 1.05, "anderson": 1.15, "broyden": 1.25}


def contests(settings: Settings) -> Iterator[Contest]:
    """Yield one contest per size."""
    for width, batch in SIZES[:1] if settings.quick else SIZES:
        problem = work.synthetic(width, batch, settings)
        contenders = [_contender(LOOP, "floor", lambda p=problem: _loop(p))]
        ratios = []
        for solver, (fast, silva) in SOLVERS.items():
            common = {"f_max_iter": evaluations(solver, N), "f_tol": 0.0, "f_stop_mode": "rel"}
            theirs = {"f_solver": solver, "grad": K, "tau": 1.0, **common}
            ours = {"f_solver": fast, "grad": f"upg(k={K}, lam=1.0)", **common}
            peer = {"backward_mode": "phantom", "phantom_steps": K, "phantom_tau": 1.0}
            names = f"torchdeq: {solver}", fast, f"silva: {silva}"
            contenders += [
                _contender(
                    names[0],
                    "torchdeq",
                    lambda p=problem, o=theirs: solved(p, torchdeq(**o)),
                ),
                _contender(
                    names[1],
                    "ours",
                    lambda p=problem, o=ours: solved(p, torchdeq(**o)),
                ),
                _contender(
                    names[2],
                    "silva",
                    lambda p=problem, s=silva, o=peer: solved(
                        p, Silva(p.tensors, solver=s, max_iter=N, **o)
                    ),
                ),
            ]
            over_torchdeq = over_loop = None
            if width <= 128:
                over_torchdeq = TARGETS[solver] if batch == 1 else BATCHED
            else:
                over_loop = LARGE[solver]
            if solver == "fixed_point_iter" and batch == 1:
                over_loop = 2.0
            ratios += [
                Ratio(fast, names[0], over_torchdeq),
                Ratio(fast, LOOP, over_loop),
                Ratio(names[0], LOOP),
                Ratio(fast, names[2], 0.95),
                Ratio(fast, names[0], of="launches"),
            ]
        work_name = f"{problem.name}, {N} evaluations, upg(k={K}, lam=1.0)"
        yield Contest("small", work_name, contenders, ratios)


def _contender(name: str, peer: str, make: Run) -> Contender:
    made: list[Run] = []

    def prepared() -> Run:
        made.append(make())
        return made[0]

    return Contender(name, peer, prepared, measure=lambda: launches(made[0]))


def _loop(problem: Problem) -> Run:
    solve, back = solve_floor(problem, N), upg_floor(problem, K, 1.0)

    def run() -> None:
        solve()
        back()

    return run
