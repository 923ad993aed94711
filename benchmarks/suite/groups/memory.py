"""Measures the memory of attaching a gradient and differentiating it, on MDEQ-tiny.

It measures the bytes that autograd holds between the forward and the backward pass, and the peak of
both passes together. The bytes are counted, not sampled, so they are the same every time. On CUDA
the peak is that of the allocator.
"""

from __future__ import annotations

from collections.abc import Iterator

from .. import work
from ..contest import Contender, Contest, Ratio, Settings
from ..peers import attached, seam

STEPS = (1, 2, 5, 10, 20)


def contests(settings: Settings) -> Iterator[Contest]:
    """Yield the contest."""
    problem = work.mdeq("tiny", settings, "channels_last")
    steps = (1, 2) if settings.quick else STEPS
    specs = [f"npg(k={k})" for k in steps] + [f"upg(k={k})" for k in steps]
    specs += [f"upg(k={k}, checkpoint=True)" for k in steps]
    specs += [f"ift(solver={name!r}, tol=1e-12, max_iter=20)" for name in ("gmres", "broyden")]
    specs += ["ift(solver='bicgstab', tol=1e-12, max_iter=20)", "jfb"]
    # Each of these two evaluates f 20 times.
    specs += ["bptt(steps=20)", "reversible(steps=10)"]
    contenders = [Contender(spec, "ours", lambda s=spec: attached(problem, s)) for spec in specs]
    for k in steps:
        contenders.append(
            Contender(
                f"phantom gradient (grad={k})",
                "torchdeq",
                lambda k=k: seam(problem, grad=k, tau=0.5),
            )
        )
    for kind in ("ift", "hook_ift"):
        for solver in ("broyden", "anderson", "fixed_point_iter"):
            settings_of = {kind: True, "b_solver": solver, "b_max_iter": 20, "b_tol": 0.0}
            contenders.append(
                Contender(
                    f"{kind}, {solver}, 20 iterations",
                    "torchdeq",
                    lambda s=settings_of: seam(problem, **s),
                )
            )
    ratios = [Ratio("reversible(steps=10)", "bptt(steps=20)")]
    if 5 in steps:
        ratios.append(Ratio("upg(k=5, checkpoint=True)", "upg(k=5)"))
    yield Contest(
        "memory", problem.name, contenders, ratios, problem.func, problem.known, repeats=3
    )
