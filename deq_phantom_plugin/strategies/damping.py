"""The adaptive damping factor."""

from __future__ import annotations

import torch
from torch import Tensor

from ..adjoint import Linearization, Packing, inside_checkpoint
from ..adjoint.spectrum import leading_eigenvalue, random_start
from ..memory import Memory

# Between training steps J changes little, so a few products keep the estimate up to date.
FIRST_VJPS, WARM_VJPS, BASIS = 20, 5, 5


def damping(graph: Linearization, batch_dim: int | None, memory: Memory | None) -> list[Tensor]:
    """Return lam = min(1, 1/rho(J)) for each sample (supplement, section 4.3).

    Args:
        graph: F at the equilibrium.
        batch_dim: see `Context.batch_dim`.
        memory: where the last step's eigenvectors are kept as this one's start.

    Returns:
        A tensor a leaf that broadcasts over it.
    """
    packing = Packing(graph.inputs, batch_dim)

    def apply(x: Tensor) -> Tensor:
        return packing.pack(graph.vjp(packing.unpack(x)))

    with torch.no_grad():
        start = random_start(packing)
        warm = memory.warm_start("eigenvector", start) if memory is not None else None
        found = leading_eigenvalue(
            apply,
            start if warm is None else warm,
            tol=1e-2,
            max_vjp=FIRST_VJPS if warm is None else WARM_VJPS,
            basis=BASIS,
        )
        # A checkpointed region runs twice, and must find the same start both times.
        if memory is not None and not inside_checkpoint():
            memory.keep("eigenvector", found.vector)
        return packing.spread(1 / found.radius.clamp(min=1))
