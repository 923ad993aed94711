"""Times solve + attach + backward on the synthetic map of the supplement, from small to large."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .. import work
from ..contest import Contender, Contest, Ratio, Settings
from ..peers import Silva, solve_floor, strategy, torchdeq, upg_floor
from ..timing import Run
from ..work import Problem

N = 22  # evaluations of the forward solve, and products of an implicit gradient
SIZES = ((128, 1), (128, 32), (128, 256), (512, 32), (2048, 1), (2048, 32), (4096, 32))
UPG, NPG = "upg(k=5, lam=0.5)", "npg(k=5, lam=0.5)"
IFT = f"ift(tol=1e-12, max_iter={N})"
SILVA: dict[str, dict[str, Any]] = {
    "phantom": {"backward_mode": "phantom", "phantom_steps": 5, "phantom_tau": 0.5},
    # `alpha` damps the forward solve as well, which does not change the amount of work.
    "neumann": {"backward_mode": "neumann", "neumann_terms": 5, "alpha": 0.5},
    "implicit (gmres)": {"backward_mode": "implicit", "backward_max_iter": N},
}


def contests(settings: Settings) -> Iterator[Contest]:
    """Yield one contest per size."""
    for width, batch in ((16, 2),) if settings.quick else SIZES:
        problem = work.synthetic(width, batch, settings)
        solve = {"f_solver": "fixed_point_iter", "f_max_iter": N, "f_tol": 0.0}
        fast = {**solve, "f_solver": "fixed_point_fast"}
        implicit = {"ift": True, "b_solver": "fixed_point_iter", "b_max_iter": N, "b_tol": 0.0}
        runs: dict[str, tuple[str, dict[str, Any]]] = {
            "phantom gradient (5, 0.5)": ("torchdeq", {**solve, "grad": 5, "tau": 0.5}),
            f"ift, fixed_point_iter, {N}": ("torchdeq", {**solve, **implicit}),
            f"ift, broyden, {N}": ("torchdeq", {**solve, **implicit, "b_solver": "broyden"}),
        }
        for spec in (UPG, NPG, IFT):
            runs[spec] = ("ours", {**fast, "grad": spec})
        contenders = [
            Contender(name, peer, lambda p=problem, s=options: solved(p, torchdeq(**s)))
            for name, (peer, options) in runs.items()
        ]
        for name, options in SILVA.items():
            contenders.append(
                Contender(
                    f"silva {name}",
                    "silva",
                    lambda p=problem, s=options: solved(
                        p, Silva(p.tensors, solver="picard", max_iter=N, **s)
                    ),
                )
            )
        contenders.append(Contender("upg floor", "floor", lambda p=problem: _floor(p)))
        contenders.append(
            Contender(f"{UPG}, no framework", "ours", lambda p=problem: _without_framework(p, UPG))
        )
        yield Contest(
            "synthetic",
            f"{problem.name}, picard {N} forward",
            contenders,
            [
                Ratio(UPG, "phantom gradient (5, 0.5)"),
                Ratio(IFT, f"ift, fixed_point_iter, {N}"),
                Ratio(UPG, "silva phantom", 0.95),
                Ratio(NPG, "silva neumann", 0.95),
                Ratio(IFT, "silva implicit (gmres)", 0.95),
                Ratio(f"{UPG}, no framework", "upg floor", 1.05),
            ],
            problem.func,
            problem.known,
        )


def solved(problem: Problem, deq: torch.nn.Module) -> Run:
    """Return code that solves and attaches in a module, and differentiates."""

    def run() -> None:
        states, _ = deq(problem.spread, problem.start)
        problem.backward(states[-1])

    return run


def _floor(problem: Problem) -> Run:
    solve, back = solve_floor(problem, N), upg_floor(problem, 5, 0.5)

    def run() -> None:
        solve()
        back()

    return run


def _without_framework(problem: Problem, spec: str) -> Run:
    from ..peers import attached

    solve, back = solve_floor(problem, N), attached(problem, repr(strategy(spec)))

    def run() -> None:
        solve()
        back()

    return run
