"""The adaptive damping factor."""

from __future__ import annotations

import torch
from torch import Tensor

from .._plumbing.precision import full_precision
from .._plumbing.transforms import as_constants
from ..adjoint import Linearization, Packing
from ..adjoint.spectrum import leading_eigenvalue, random_start

# Products of one Krylov space, from a fixed random start. The eigenvectors of the last step would
# be a worse start wherever the batch changes: they hardly contain the leading eigenvectors of the
# new batch, so that rho comes out far too low.
N_VJP = 10


def damping(graph: Linearization, batch_dim: int | None) -> list[Tensor]:
    """Return lam = min(1, 1/rho(J)) per sample.

    Source: "On Training Implicit Models", supplement, section 4.3.

    Args:
        graph: F at the equilibrium.
        batch_dim: see `Context.batch_dim`.

    Returns:
        One tensor per leaf, which broadcasts over the leaf.
    """
    packing = Packing(graph.inputs, batch_dim)

    def apply(x: Tensor) -> Tensor:
        # Otherwise forward mode would follow the products, and differentiate the factor too.
        return packing.pack(as_constants(graph.vjp(packing.unpack(x))))

    if packing.columns == 0:
        return packing.spread(torch.ones(packing.rows, dtype=packing.dtype, device=packing.device))
    with torch.no_grad(), full_precision(packing.device):
        start = random_start(packing)
        found = leading_eigenvalue(apply, start, tol=0, max_vjp=N_VJP, basis=N_VJP)
        return packing.spread(1 / found.radius.clamp(min=1))
