"""Times phantom gradients (attach + backward) at a fixed equilibrium: ours, TorchDEQ's, floors."""

from __future__ import annotations

from collections.abc import Iterator

from .. import work
from ..contest import Contender, Contest, Ratio, Settings
from ..peers import PhantomGrad, attached, npg_floor, seam, upg_floor
from ..timing import Run

K, LAM = 5, 0.5
PEER = "phantom gradient (grad=5, tau=0.5)"
LAYER = "MDEQWrapper (pg_steps=5, tau=0.5)"
UPG, NPG = "upg(k=5, lam=0.5)", "npg(k=5, lam=0.5)"


def contests(settings: Settings) -> Iterator[Contest]:
    """Yield one contest per model and memory format.

    All contenders have the same f, which does not restore the memory format. TorchDEQ is also
    measured with an f that restores it, as that of our MDEQ adapter does.
    """
    for preset in ("tiny",) if settings.quick else ("tiny", "small"):
        for layout in work.FORMATS:
            yield _contest(preset, layout, settings)


def _contest(preset: str, layout: str, settings: Settings) -> Contest:
    problem = work.mdeq(preset, settings, layout)
    restoring = work.restoring(problem)
    peer = {"grad": K, "tau": LAM}
    contenders = [
        Contender(PEER, "torchdeq", lambda: seam(problem, **peer)),
        Contender(
            f"{PEER}, f restores format",
            "torchdeq",
            lambda: seam(restoring, **peer),
            func=restoring.func,
        ),
        Contender(
            f"{PEER}, no_stat=True (list, no flat vector)",
            "torchdeq",
            lambda: seam(problem, no_stat=True, **peer),
        ),
        Contender(LAYER, "Gsunshine/phantom_grad", lambda: _layer(problem)),
        Contender(f"{UPG} in TorchDEQ", "ours", lambda: seam(problem, grad=UPG)),
        Contender(f"{UPG} attach", "ours", lambda: attached(problem, UPG)),
        Contender("upg floor", "floor", lambda: upg_floor(problem, K, LAM)),
        Contender(f"{NPG} in TorchDEQ", "ours", lambda: seam(problem, grad=NPG)),
        Contender(f"{NPG} attach", "ours", lambda: attached(problem, NPG)),
        Contender("npg floor", "floor", lambda: npg_floor(problem, K, LAM)),
        Contender("jfb attach", "ours", lambda: attached(problem, "jfb")),
    ]
    ratios = [
        Ratio(f"{UPG} in TorchDEQ", PEER, 0.82),
        Ratio(f"{UPG} attach", PEER, 0.82),
        Ratio(f"{UPG} attach", f"{PEER}, f restores format"),
        Ratio(f"{UPG} attach", f"{PEER}, no_stat=True (list, no flat vector)"),
        Ratio(f"{UPG} attach", LAYER),
        Ratio(f"{UPG} in TorchDEQ", "upg floor", 1.05),
        Ratio(f"{UPG} attach", "upg floor", 1.05),
        Ratio(f"{NPG} attach", "npg floor", 1.05),
        Ratio(f"{NPG} in TorchDEQ", "npg floor", 1.05),
        Ratio(f"{NPG} attach", f"{UPG} attach", 0.55),
        Ratio(f"{NPG} in TorchDEQ", f"{UPG} in TorchDEQ", 0.55),
    ]
    title = f"{problem.name}, forward residual {problem.residual:.1e}"
    return Contest("backward", title, contenders, ratios, problem.func, problem.known)


def _layer(problem: work.Problem) -> Run:
    """Return code that attaches in phantom_grad's layer, and differentiates."""
    layer = PhantomGrad(K, LAM, updates=None)

    def run() -> None:
        states, _ = layer(problem.spread, problem.equilibrium)
        problem.backward(states[-1])

    return run
