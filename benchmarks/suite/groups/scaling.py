"""Measures how time and bytes of attach + backward grow with k, batch and state, on MDEQ-tiny."""

from __future__ import annotations

from collections.abc import Iterator

from .. import work
from ..contest import Contender, Contest, Ratio, Settings
from ..peers import attached, seam
from ..work import Problem

STEPS = (1, 2, 5, 10, 20)
BATCHES = (4, 16, 64)
SIDES = (16, 48)


def contests(settings: Settings) -> Iterator[Contest]:
    """Yield one contest per k, then one per batch size, and then one per size of image."""
    problem = work.mdeq("tiny", settings, "channels_last")
    for k in (1, 2) if settings.quick else STEPS:
        yield _contest(f"k={k}: {problem.name}", problem, k)
    if settings.quick:
        return
    for batch in BATCHES:
        problem = work.mdeq("tiny", settings, "channels_last", batch=batch)
        yield _contest(f"k=5: {problem.name}", problem, 5)
    for side in SIDES:
        problem = work.mdeq("tiny", settings, "channels_last", side=side)
        yield _contest(f"k=5: {problem.name}", problem, 5)


def _contest(title: str, problem: Problem, k: int) -> Contest:
    upg, npg = f"upg(k={k}, lam=0.5)", f"npg(k={k}, lam=0.5)"
    peer = f"phantom gradient (grad={k}, tau=0.5)"
    contenders = [
        Contender(peer, "torchdeq", lambda: seam(problem, grad=k, tau=0.5)),
        Contender(upg, "ours", lambda: attached(problem, upg)),
        Contender(npg, "ours", lambda: attached(problem, npg)),
    ]
    ratios = [Ratio(upg, peer), Ratio(npg, upg)]
    return Contest("scaling", title, contenders, ratios, problem.func, problem.known, repeats=5)
