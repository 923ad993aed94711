"""The adaptive damping factor."""

from __future__ import annotations

import torch
from torch import Tensor

from ..adjoint import Linearization, Packing, inside_checkpoint
from ..adjoint.spectrum import leading_eigenvalue, random_start
from ..memory import Memory

# An eigenvector of the last step ends the search in the first BASIS products where J changed
# little, as on a graph. Where the batch is another one it is a start like any other, and the
# residual tells: without it rho came out too low by half, and the sums grew.
MAX_VJPS, BASIS, TOL = 20, 5, 0.1


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
            tol=TOL,
            max_vjp=MAX_VJPS,
            basis=BASIS,
        )
        # A checkpointed region runs twice, and must find the same start both times.
        if memory is not None and not inside_checkpoint():
            memory.keep("eigenvector", found.vector)
        return packing.spread(1 / found.radius.clamp(min=1))
