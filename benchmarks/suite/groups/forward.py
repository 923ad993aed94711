"""Times the forward solve alone: 22 evaluations of f with each solver, and its residuals."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from .. import work
from ..contest import Contender, Contest, Ratio, Settings
from ..peers import Silva, evaluations, solve_floor, torchdeq
from ..timing import Run
from ..work import Problem

N = 22
SOLVERS = ("fixed_point_iter", "anderson", "broyden")
FAST = {"fixed_point_iter": "fixed_point_fast", "anderson": "anderson_fast"}
FAST["broyden"] = "broyden_fast"
TARGETS = {"broyden": 0.55}
# silva-networks' names of the solvers, in the order of `SOLVERS`, with the number of iterations
# that makes N evaluations.
SILVA = {"picard": N, "anderson": N, "broyden": N - 1}
HISTORY = {"picard": 1, "anderson": 6, "broyden": N}


def contests(settings: Settings) -> Iterator[Contest]:
    """Yield one contest per memory format; f restores it for all contenders."""
    for layout in work.FORMATS:
        problem = work.restoring(work.mdeq("tiny", settings, layout))
        contenders = [Contender("floor", "floor", lambda p=problem: solve_floor(p, N))]
        for solver in SOLVERS:
            for name, peer in ((solver, "torchdeq"), (FAST[solver], "ours")):
                contenders.append(
                    Contender(
                        name,
                        peer,
                        lambda p=problem, s=name: run_module(p, _torchdeq(s)),
                        measure=lambda p=problem, s=name: _residuals(p, lambda: _torchdeq(s)),
                    )
                )
        for solver, iterations in SILVA.items():
            contenders.append(
                Contender(
                    f"silva {solver}",
                    "silva",
                    lambda p=problem, s=solver, n=iterations: run_module(p, _silva(s, n)),
                    measure=lambda p=problem, s=solver, n=iterations: _residuals(
                        p, lambda: _silva(s, n)
                    ),
                )
            )
        ratios = [Ratio(FAST[s], s, TARGETS.get(s)) for s in SOLVERS]
        ratios += [
            Ratio(FAST[ours], f"silva {silva}", 1.0)
            for ours, silva in zip(SOLVERS, SILVA, strict=True)
        ]
        ratios += [Ratio(s, "floor") for s in (*SOLVERS, *FAST.values())]
        title = f"{problem.name}, {N} evaluations"
        yield Contest("forward", title, contenders, ratios, problem.func, problem.known)


def _torchdeq(solver: str) -> torch.nn.Module:
    """Return TorchDEQ's module in evaluation mode, in which nothing is attached."""
    settings = {"f_max_iter": evaluations(solver, N), "f_tol": 0.0, "f_stop_mode": "rel"}
    return torchdeq(f_solver=solver, **settings).eval()


def _silva(solver: str, iterations: int) -> torch.nn.Module:
    """Return silva-networks' engine, which treats the whole batch as one coupled system."""
    return Silva(
        [], solver=solver, max_iter=iterations, history=HISTORY[solver], backward_mode="implicit"
    )


def run_module(problem: Problem, deq: torch.nn.Module) -> Run:
    """Return code that solves in a module without autograd."""

    @torch.no_grad()
    def run() -> object:
        states, _ = deq(problem.spread, problem.start)
        return states[-1]

    return run


def _residuals(problem: Problem, make: Callable[[], torch.nn.Module]) -> dict[str, float]:
    """Return the median and the largest residual of a solve; empty if the solve fails."""
    try:
        state = run_module(problem, make())()
    except Exception:  # the contest has already reported it
        return {}
    found = work.residuals(problem.func, state)
    return {"residual, median": float(found.median()), "residual, worst": float(found.max())}
