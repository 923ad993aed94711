"""Times the overhead of a strategy per call, with an f that does almost nothing."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..accounting import Counted
from ..contest import Contender, Contest, Ratio, Settings
from ..peers import attached, npg_floor, seam, upg_floor
from ..timing import Run
from ..work import Problem

OURS = ("jfb", "upg(k=1)", "upg(k=5)", "npg(k=5)", "ift(tol=1e-12, max_iter=5)")
THEIRS = {
    "phantom gradient (grad=1)": {"grad": 1},
    "phantom gradient (grad=5, tau=0.5)": {"grad": 5, "tau": 0.5},
    "ift, fixed_point_iter, 5": {"ift": True, "b_max_iter": 5, "b_tol": 0.0},
    "hook_ift, fixed_point_iter, 5": {"hook_ift": True, "b_max_iter": 5, "b_tol": 0.0},
}


def contests(settings: Settings) -> Iterator[Contest]:
    """Yield the contest: attach + backward, through TorchDEQ's module and without it.

    f multiplies by a number below one. With one, I - J would have no inverse.
    """
    calls = 5 if settings.quick else 100
    place = {"device": settings.device, "dtype": settings.dtype}
    scale = torch.tensor(0.5, requires_grad=True, **place)
    state = torch.zeros(4, 8, **place)
    problem = Problem(
        f"f(h) = h * w on 4 x 8 numbers, attach + backward, ms for one of {calls} calls in a row",
        Counted(lambda h: h * scale),
        state,
        state,
        [torch.ones_like(state)],
        [scale],
        0.0,
    )
    contenders = [
        Contender("upg floor (k=5)", "floor", lambda: _often(upg_floor(problem, 5, 0.5), calls)),
        Contender("npg floor (k=5)", "floor", lambda: _often(npg_floor(problem, 5, 0.5), calls)),
    ]
    for spec in OURS:
        contenders += [
            Contender(spec, "ours", lambda s=spec: _often(attached(problem, s), calls)),
            Contender(
                f"{spec} in TorchDEQ",
                "ours",
                lambda s=spec: _often(seam(problem, grad=s), calls),
            ),
        ]
    for name, options in THEIRS.items():
        contenders.append(
            Contender(name, "torchdeq", lambda o=options: _often(seam(problem, **o), calls))
        )
    peer, implicit = "phantom gradient (grad=5, tau=0.5)", "ift, fixed_point_iter, 5"
    ratios = [
        Ratio("upg(k=5) in TorchDEQ", peer),
        Ratio("upg(k=5)", peer),
        Ratio("npg(k=5) in TorchDEQ", peer),
        Ratio("ift(tol=1e-12, max_iter=5) in TorchDEQ", implicit),
    ]
    yield Contest("overhead", problem.name, contenders, ratios, per_call=calls)


def _often(run: Run, calls: int) -> Run:
    def repeated() -> None:
        for _ in range(calls):
            run()

    return repeated
