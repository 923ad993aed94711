"""Counts the operators that launch kernels in a training step of MDEQ-tiny.

The numbers are exact, and the same on every machine. They are those of the forward and the backward
pass. The optimiser does not count, since it is the same for all contenders.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .. import work
from ..accounting import launches
from ..contest import Contender, Contest, Ratio, Settings
from ..peers import evaluations, torchdeq
from ..timing import Run
from ..work import Training
from .step import BACKWARD, FORWARD

UPG, IFT = "broyden_fast + upg", "broyden_fast + ift, 24 VJPs"
PHANTOM, IMPLICIT = "torchdeq: phantom gradient (5, 0.5)", "torchdeq: ift (broyden, 24)"


def contests(settings: Settings) -> Iterator[Contest]:
    """Yield the contest."""
    training = work.mdeq_training("tiny", settings, "contiguous")
    broyden: dict[str, Any] = {"b_solver": "broyden", "b_max_iter": BACKWARD - 1, "b_tol": 0.0}
    methods: dict[str, tuple[str, dict[str, Any]]] = {
        PHANTOM: ("broyden", {"grad": 5, "tau": 0.5}),
        IMPLICIT: ("broyden", {"ift": True, **broyden}),
        UPG: ("broyden_fast", {"grad": "upg(k=5, lam=0.5)"}),
        IFT: ("broyden_fast", {"grad": f"ift(tol=1e-12, max_iter={BACKWARD})"}),
    }
    contenders = [
        _contender(name, training, solver, options) for name, (solver, options) in methods.items()
    ]
    ratios = [
        Ratio(UPG, PHANTOM, 0.63, of="launches"),
        Ratio(IFT, IMPLICIT, 0.55, of="launches"),
    ]
    # `ift` stops short here by design, so the first three steps ask anew whether samples depend on
    # one another. The fourth step does not, and is the one whose operators are counted.
    yield Contest("launches", training.name, contenders, ratios, repeats=2)


def _contender(name: str, training: Training, solver: str, options: dict[str, Any]) -> Contender:
    made: list[Run] = []

    def make() -> Run:
        solve = {"f_max_iter": evaluations(solver, FORWARD), "f_tol": 0.0, "f_stop_mode": "rel"}
        deq = torchdeq(f_solver=solver, **solve, **options)

        def passes() -> None:
            training.holder.deq = deq
            training.loss().backward()

        made.append(passes)
        return passes

    peer = "torchdeq" if name.startswith("torchdeq") else "ours"
    return Contender(name, peer, make, measure=lambda: launches(made[0]))
