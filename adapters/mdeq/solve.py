"""`MDEQSolve`, the record of the last forward solve of an MDEQ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deq_phantom_plugin._plumbing.compilation import never_compiled
from deq_phantom_plugin._plumbing.trial import Trial


@dataclass(frozen=True, eq=False)
class MDEQSolve:
    """The last forward solve of an `MDEQ`; nothing in it carries an autograd graph.

    Attributes:
        residual: the lowest ||f(h) - h|| / ||f(h)|| that each sample reached, shape (B,).
        nfe: the number of evaluations of f in the solve of the batch, an integer tensor, shape ().
        equilibrium: the state that was classified, one tensor per branch.
        injection: the output of the stem, shape (B, channels[0], H, W).
        shared: the normalised weights and dropout masks of the solve.
    """

    residual: Tensor
    nfe: Tensor
    equilibrium: list[Tensor] = field(repr=False)
    injection: Tensor = field(repr=False)
    shared: list[Tensor | None] = field(repr=False)


@never_compiled
@torch.no_grad()
def residual_of(func: Callable[[list[Tensor]], list[Tensor]], state: list[Tensor]) -> Tensor:
    """Return ||f(h) - h|| / ||f(h)|| of each sample, shape (B,).

    Args:
        func: f.
        state: h, a list of tensors whose first dimension is the batch.
    """
    with Trial(state):
        # Squares of 16 bits overflow above 256.
        wide = torch.promote_types(state[0].dtype, torch.float32)
        h, image = (
            torch.cat([x.flatten(1) for x in s], dim=1).to(wide) for s in (state, func(state))
        )
    residual: Tensor = (image - h).norm(dim=1) / (image.norm(dim=1) + 1e-9)
    return residual
