"""The projection of W that makes the equilibrium exist, unique and reachable by iteration."""

from __future__ import annotations

import torch
from torch import Tensor


def project_rows(weight: Tensor, radius: Tensor) -> Tensor:
    """Project each row onto the L1 ball: all of W onto the inf-norm ball ||W||_inf <= radius.

    By sorting, Duchi et al. 2008, "Efficient Projections onto the l1-Ball for Learning in High
    Dimensions", Figure 1; differentiable.

    Args:
        weight: shape (rows, columns).
        radius: of the ball, shape (); infinite for none.
    """
    magnitude = weight.abs()
    ordered = magnitude.sort(dim=1, descending=True).values
    excess = ordered.cumsum(dim=1) - radius
    count = torch.arange(1, weight.shape[1] + 1, device=weight.device)
    kept = (ordered * count > excess).sum(dim=1, keepdim=True).clamp_min(1)
    threshold = excess.gather(1, kept - 1) / kept
    shrunk = weight.sign() * (magnitude - threshold).clamp_min(0)
    return torch.where(magnitude.sum(dim=1, keepdim=True) > radius, shrunk, weight)
