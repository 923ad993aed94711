"""Compares silva-networks' own backward modes with our strategies, which replace them by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.extras import why_not

from .. import work
from ..contest import Contender, Contest, Ratio, Settings, Unavailable
from ..peers import Silva
from .synthetic import solved

N = 22  # iterations of the forward solve, and products of an implicit gradient
SIZES = ((512, 32), (2048, 32))
BROYDEN: dict[str, Any] = {"solver": "broyden", "max_iter": N, "history": N}
# The mode of silva-networks, our spec in its place, and the options that both get.
PAIRS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("phantom", "upg", {"phantom_steps": 5, "phantom_tau": 0.5}),
    ("neumann", "npg(k=5, lam=0.5)", {"neumann_terms": 5, "alpha": 0.5}),
    ("jfb", "jfb()", {}),
    ("shine", "shine(fallback=None)", BROYDEN),
    ("implicit", f"ift(tol=1e-12, max_iter={N})", {"backward_max_iter": N}),
)


def contests(settings: Settings) -> Iterator[Contest]:
    """Yield one contest per size."""
    if why := why_not("silva_networks"):
        raise Unavailable(f"{why}: make bench-silva")
    dpp.enable("silva")
    for width, batch in ((16, 2),) if settings.quick else SIZES:
        problem = work.synthetic(width, batch, settings)
        contenders, ratios = [], []
        for own, spec, given in PAIRS:
            options = {"solver": "picard", "max_iter": N, **given}
            for mode, peer in ((own, "silva"), (spec, "ours")):
                contenders.append(
                    Contender(
                        mode,
                        peer,
                        lambda p=problem, o=options, m=mode: solved(
                            p, Silva(p.tensors, backward_mode=m, **o)
                        ),
                    )
                )
            ratios.append(Ratio(spec, own))
        title = f"{problem.name}, in silva-networks, {N} forward"
        yield Contest("silva", title, contenders, ratios, problem.func, problem.known)
