"""Products no longer than a multiple of the gradient that came in, sample by sample."""

from __future__ import annotations

import torch
from torch import Tensor


class Clip:
    """Scales a product J^T x down to the length `limit` ||v|| in the samples in which it is longer.

    The direction of the product stays. Where no product is longer, every number stays what it is,
    bit for bit. A product that is NaN or infinite is not clipped, so that later checks find it.

    Args:
        v: the gradient that came in, shape (B, D).
        limit: the largest length of a product, in multiples of ||v||.
    """

    def __init__(self, v: Tensor, limit: float) -> None:
        unit, largest = _scaled_norm(v)
        self._bound = limit * unit, largest
        self._count = v.new_zeros((), dtype=torch.int64)

    def __call__(self, product: Tensor) -> Tensor:
        """Return the clipped product, and count the samples in which it was too long.

        Args:
            product: J^T x, shape (B, D).
        """
        (bound, of_bound), (unit, largest) = self._bound, _scaled_norm(product)
        ratio = bound / unit * (of_bound / largest)  # NaN where both are zero
        clipped = (ratio < 1) & torch.isfinite(unit)
        self._count += clipped.sum()
        return product * torch.where(clipped, ratio, 1)

    @property
    def n_clipped(self) -> int:
        """The number of products that were clipped so far, each counted once per sample.

        To ask waits for the device.
        """
        return int(self._count)


def _scaled_norm(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return two factors, each of shape (B, 1), whose product is the norm of each row.

    The norm itself could overflow or vanish: the squares of numbers beyond the root of the dtype's
    range do.
    """
    if rows.shape[1] == 0:
        return rows.new_zeros(len(rows), 1), rows.new_ones(len(rows), 1)
    largest = torch.linalg.vector_norm(rows, ord=torch.inf, dim=1, keepdim=True)
    usable = torch.isfinite(largest) & (largest > 0)
    largest = torch.where(usable, largest, 1)
    return torch.linalg.vector_norm(rows / largest, dim=1, keepdim=True), largest
