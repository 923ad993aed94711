"""Sketches of states: a few numbers by which the distance of two states is estimated.

A sketch is a random projection. It is kept in place of the state, and needs far less memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_SEEDED = 0  # the seed of the signs' own generator, so that the run's random state is not used
_PROJECTIONS = 8  # numbers per leaf


class Sketch:
    """Projects states onto random signs, with 8 numbers per leaf.

    For any fixed x the mean square of its projections equals ||x||^2 in expectation over the signs.
    Projections are linear. So the difference of two sketches estimates the distance of two states.

    Each leaf is seen as a matrix that is about square. The sign of its element (i, j) is a sign of
    row i times a sign of column j. So the memory for signs grows as the square root of the leaf's
    size.

    Args:
        leaves: the leaves of a state, for the shapes, dtypes and devices of those to come.
    """

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        self._signs = [_signs(_flat(leaf)) for leaf in leaves]

    @torch.no_grad()
    def __call__(self, leaves: Sequence[Tensor]) -> Tensor:
        """Return the projections of each leaf, shape (number of leaves, 8)."""
        projected = []
        for leaf, (rows, columns) in zip(leaves, self._signs, strict=True):
            flat, width = _flat(leaf), columns.shape[1]  # rows: (8, height), columns: (8, width)
            whole = rows.shape[1] * width  # elements in full rows
            sums = rows @ flat[:whole].view(-1, width)  # (8, width)
            if whole < len(flat):  # the last row is not full; its signs of rows are 1
                sums[:, : len(flat) - whole] += flat[whole:]
            projected.append((sums * columns).sum(1))  # (8,)
        if len(projected) == 1:
            return projected[0][None]
        return torch.stack([p.to(projected[0].device) for p in projected])


def _flat(leaf: Tensor) -> Tensor:
    """Return a leaf as a real vector; a complex number gives two elements."""
    leaf = leaf.detach()
    return (torch.view_as_real(leaf) if leaf.is_complex() else leaf).flatten()


def _signs(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Return the signs of the rows, shape (8, height), and of the columns, shape (8, width)."""
    # With few rows and columns the products of signs repeat too much. So leaves of at most 64
    # elements have one row, and one sign per element.
    width = max(1, min(len(flat), 64), math.isqrt(len(flat)))
    generator = torch.Generator().manual_seed(_SEEDED)

    def draw(count: int) -> Tensor:
        drawn = torch.randint(0, 2, (_PROJECTIONS, count), generator=generator)
        return (2 * drawn - 1).to(flat)

    return draw(len(flat) // width), draw(width)
