"""Compares a training step whose F is compiled (`compile=True`) with the same step without it.

The first step, which compiles, is not timed. `graphs` is the number of graphs that it compiles, and
`graphs later` the number that later steps compile, which should be zero.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from .. import work
from ..contest import Contender, Contest, Ratio, Settings, available
from ..peers import evaluations, torchdeq
from ..timing import Run
from ..work import Training
from .step import FORWARD, OURS, step

SOLVER, UPG = "broyden_fast", "broyden_fast + upg"
EAGER, COMPILED = f"{UPG}, F as written", f"{UPG}, compile=True"


def contests(settings: Settings) -> Iterator[Contest]:
    """Yield one contest per model."""
    builders: list[Callable[[], tuple[Training, float | None]]] = [
        lambda: (work.mdeq_training("tiny", settings, "contiguous"), 0.92),
        lambda: (work.mdeq_training("tiny", settings, "channels_last"), None),
        lambda: (work.transformer_training(128, 16, 64, settings), 0.80),
        lambda: (work.transformer_training(128, 4, 64, settings), None),
    ]
    for training, target in available(builders[2:3] if settings.quick else builders):
        contenders = [_contender(EAGER, False, training), _contender(COMPILED, True, training)]
        yield Contest("compiled", training.name, contenders, [Ratio(COMPILED, EAGER, target)])


def _contender(method: str, compile: bool, training: Training) -> Contender:
    found: dict[str, float] = {}

    def make() -> Run:
        solve: dict[str, Any] = {"f_tol": 0.0, "f_stop_mode": "rel", "grad": OURS[UPG]}
        deq = torchdeq(f_solver=SOLVER, f_max_iter=evaluations(SOLVER, FORWARD), **solve)
        plain, holder = step(training, deq), training.holder

        def run() -> None:
            if hasattr(holder.config, "compile"):
                holder.config.compile = compile
            else:
                holder.compiles = compile
            before = _graphs()
            plain()
            found["graphs later"] = found.get("graphs later", 0) + _graphs() - before

        start = time.perf_counter()
        run()
        found["first step s"] = time.perf_counter() - start
        found["graphs"] = found.pop("graphs later")
        return run

    return Contender(method, "ours", make, measure=lambda: found)


def _graphs() -> int:
    """Return the number of graphs that were compiled so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
