"""Whether the residual of an adjoint solve tells how good g is, for a system of unequal parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .implicit import VJP

# The weighted residual above which g is no solution: so many times `tol`, within these bounds.
_TIMES, _LEAST, _MOST = 100, 0.01, 0.1


@torch.no_grad()
def drowns(
    vjp: VJP, v: Sequence[Tensor], g: Sequence[Tensor], h: Sequence[Tensor], tol: float
) -> bool:
    """Whether a few parts of v are so large that a small residual says nothing of the others.

    A solve ends where ||r|| <= tol ||v||, with r = v - (I - J^T) g. In one system, such as a graph,
    a head that divides the state of each node by its length sends 1 / ||h_i|| to node i. Nodes of
    tiny states then have a huge v_i, and satisfy the test alone. What reaches the parameters is
    g_i times a state, so the sizes that matter are those of |h| v and |h| r.

    1. |h| r is at most max |h| ||r||, which is at most max |h| tol ||v||. If that is small beside
       || |h| v ||, all is well, and nothing more is computed.
    2. Otherwise r is computed, by one more product.

    Args:
        vjp: from the leaves of g to the leaves of J^T g.
        v: the leaves of the gradient that came in.
        g: the leaves of the solution, which has converged.
        h: the leaves of the equilibrium.
        tol: the tolerance of the solve.
    """
    # Norms of other weights differ by a small factor in any case, so a loose solve tells nothing.
    if 3 * tol > _MOST or not sum(leaf.numel() for leaf in v):
        return False
    far = min(max(_TIMES * tol, _LEAST), _MOST)
    largest = torch.stack([leaf.abs().max() for leaf in v if leaf.numel()]).max()
    scale = [leaf / largest for leaf in v]  # squares of v may overflow
    of_interest = _norm([a * b.abs() for a, b in zip(scale, h, strict=True)])
    most = torch.stack([leaf.abs().max() for leaf in h if leaf.numel()]).max() * _norm(scale)
    if bool((tol * most <= far * of_interest) | (of_interest == 0)):
        return False
    products = vjp(list(g))
    left = [a - (b - c) / largest for a, b, c in zip(scale, g, products, strict=True)]
    return bool(_norm([a * b.abs() for a, b in zip(left, h, strict=True)]) > far * of_interest)


def _norm(leaves: Sequence[Tensor]) -> Tensor:
    norm: Tensor = torch.stack([torch.linalg.vector_norm(leaf) for leaf in leaves]).norm()
    return norm
