"""The projection of W onto a ball, by which the equilibrium exists, is unique and can be iterated.

See `IGNNConv` for the radius of the ball.
"""

from __future__ import annotations

import torch
from torch import Tensor


def project_rows(weight: Tensor, radius: Tensor) -> Tensor:
    """Project each row onto the L1 ball, and so all of W onto the ball ||W||_inf <= radius.

    The algorithm sorts each row: Duchi et al. 2008, "Efficient Projections onto the l1-Ball for
    Learning in High Dimensions", Figure 1. It is differentiable.

    Args:
        weight: W, shape (rows, columns).
        radius: the radius of the ball, shape (); infinite for no projection.

    Returns:
        The projected W, shape (rows, columns).
    """
    # The projection of a row w subtracts a threshold t from each |w_j|, and cuts at zero. The k
    # largest entries stay, so t = (sum of the k largest |w_j| - radius) / k. The right k is the
    # largest one for which the k-th largest entry is above t.
    magnitude = weight.abs()
    ordered = magnitude.sort(dim=1, descending=True).values
    excess = ordered.cumsum(dim=1) - radius
    count = torch.arange(1, weight.shape[1] + 1, device=weight.device)
    kept = (ordered * count > excess).sum(dim=1, keepdim=True).clamp_min(1)
    threshold = excess.gather(1, kept - 1) / kept
    shrunk = weight.sign() * (magnitude - threshold).clamp_min(0)
    return torch.where(magnitude.sum(dim=1, keepdim=True) > radius, shrunk, weight)
