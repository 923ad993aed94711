"""A few numbers that tell how far two states are apart, without keeping either."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_SEEDED = 0  # signs are drawn apart from the random state of the run
_PROJECTIONS = 8


class Sketch:
    """Random projections of a state, a few numbers that tell how far two states are apart.

    The mean square of the projections of x is ||x||^2 on average over the signs, whatever x is.
    The sign of element (i, j) of a leaf, seen as a matrix that is about square, is one of row i
    times one of column j: what is kept grows as the root of the state.

    Args:
        leaves: of a state like those to come.
    """

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        self._signs = [_signs(_flat(leaf)) for leaf in leaves]

    @torch.no_grad()
    def __call__(self, leaves: Sequence[Tensor]) -> Tensor:
        """Return the projections of each leaf, shape (leaves, 8)."""
        projected = []
        for leaf, (rows, columns) in zip(leaves, self._signs, strict=True):
            flat, width = _flat(leaf), columns.shape[1]
            whole = rows.shape[1] * width
            sums = rows @ flat[:whole].view(-1, width)
            if whole < len(flat):
                sums[:, : len(flat) - whole] += flat[whole:]
            projected.append((sums * columns).sum(1))
        if len(projected) == 1:
            return projected[0][None]
        return torch.stack([p.to(projected[0].device) for p in projected])


def _flat(leaf: Tensor) -> Tensor:
    leaf = leaf.detach()
    return (torch.view_as_real(leaf) if leaf.is_complex() else leaf).flatten()


def _signs(flat: Tensor) -> tuple[Tensor, Tensor]:
    # The products of few signs are too much alike: small leaves have a sign an element.
    width = max(1, min(len(flat), 64), math.isqrt(len(flat)))
    generator = torch.Generator().manual_seed(_SEEDED)

    def draw(count: int) -> Tensor:
        drawn = torch.randint(0, 2, (_PROJECTIONS, count), generator=generator)
        return (2 * drawn - 1).to(flat)

    return draw(len(flat) // width), draw(width)
