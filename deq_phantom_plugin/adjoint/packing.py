"""States as one matrix with one row per sample, for solvers that know nothing of structure."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Packing:
    """Packs leaves into a (B, D) matrix and back: B independent samples of D numbers each.

    The numbers of a leaf keep the order that they have in memory. So packing a leaf is a view or a
    straight copy, and a leaf in channels_last comes back in channels_last. The matrix has the
    widest of the leaves' dtypes, and at least float32, for the sake of inner products. Complex
    leaves are packed as pairs of reals, since J^T is linear over the reals.

    Args:
        like: leaves whose shapes, dtypes and memory formats count.
        batch_dim: see `Context.batch_dim`.
    """

    def __init__(self, like: Sequence[Tensor], batch_dim: int | None) -> None:
        self._like = list(like)
        self.batch_size = batch_size(like, batch_dim)
        self.batch_dim = batch_dim if self.batch_size is not None else None
        self._orders = [_memory_order(leaf, self.batch_dim) for leaf in like]
        self._widths = [
            leaf.numel() * (2 if leaf.is_complex() else 1) // max(self.rows, 1) for leaf in like
        ]
        self.dtype = wide_dtype(like)
        # A single leaf whose dimensions are in order needs another shape and nothing else.
        self._only: torch.Size | None = None
        in_order = [list(range(leaf.dim())) for leaf in like] == self._orders
        if len(like) == 1 and in_order and like[0].dtype == self.dtype:
            self._only = like[0].shape
        self._is_matrix = self._only == (self.rows, self.columns)

    @property
    def is_half(self) -> bool:
        """Whether a leaf is in float16, whose smallest number above zero is 6e-8."""
        return any(leaf.dtype is torch.float16 for leaf in self._like)

    @property
    def rows(self) -> int:
        """B, which is 1 where samples are coupled."""
        return 1 if self.batch_size is None else self.batch_size

    @property
    def columns(self) -> int:
        """D."""
        return sum(self._widths)

    @property
    def device(self) -> torch.device:
        """Where the leaves are."""
        return self._like[0].device

    def pack(self, leaves: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        """Return the leaves as a (B, D) matrix; in `out` if that is given, else perhaps a view."""
        columns = []
        if self._only is not None:
            only = leaves[0]
            if not self._is_matrix or only.shape != self._only:  # what is not of its size raises
                only = only.reshape(self.rows, self.columns)
            columns.append(only)
        else:
            for leaf, order, width in zip(leaves, self._orders, self._widths, strict=True):
                ordered = leaf.permute(order)
                if leaf.is_complex():
                    ordered = torch.view_as_real(ordered.resolve_conj())
                columns.append(ordered.reshape(self.rows, width))
        if out is not None:
            return out.copy_(columns[0]) if len(columns) == 1 else torch.cat(columns, 1, out=out)
        columns = [c if c.dtype == self.dtype else c.to(self.dtype) for c in columns]
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)

    def unpack(self, matrix: Tensor) -> list[Tensor]:
        """Return a (B, D) matrix as leaves, in the shapes, dtypes and memory formats of `like`."""
        if self._only is not None:
            only = matrix if matrix.dtype == self.dtype else matrix.to(self.dtype)
            return [only if self._is_matrix else only.reshape(self._only)]
        leaves = []
        for part, like, order in zip(
            torch.split(matrix, self._widths, dim=1), self._like, self._orders, strict=True
        ):
            shape = [like.shape[dim] for dim in order]
            if like.is_complex():
                pairs = part.to(like.real.dtype).reshape(*shape, 2).contiguous()
                leaf = torch.view_as_complex(pairs)
            else:
                leaf = part.to(like.dtype).reshape(shape).contiguous()
            leaves.append(leaf.permute([order.index(dim) for dim in range(like.dim())]))
        return leaves

    def spread(self, per_sample: Tensor) -> list[Tensor]:
        """Return a (B,) tensor as one tensor per leaf, each of which broadcasts over its leaf."""
        if self.batch_dim is None:
            return [per_sample.reshape([1] * leaf.dim()).to(leaf.dtype) for leaf in self._like]
        return [
            per_sample.reshape(
                [-1 if dim == self.batch_dim % leaf.dim() else 1 for dim in range(leaf.dim())]
            ).to(leaf.dtype)
            for leaf in self._like
        ]


def wide_dtype(leaves: Sequence[Tensor]) -> torch.dtype:
    """Return the widest real dtype of a state, at least float32."""
    dtype = torch.float32
    for leaf in leaves:
        if leaf.dtype != dtype:
            real = leaf.real.dtype if leaf.is_complex() else leaf.dtype
            dtype = torch.promote_types(dtype, real)
    return dtype


def relative_norm(error: Tensor, of: Tensor) -> Tensor:
    """Return ||error|| / ||of|| per row, shape (B,). Zero over zero is zero.

    Args:
        error: rows of a packing, shape (B, D).
        of: the rows whose error it is, shape (B, D).
    """
    norm, size = torch.linalg.vector_norm(error, dim=1), torch.linalg.vector_norm(of, dim=1)
    return torch.where(norm == 0, norm, norm / size)


def batch_size(leaves: Sequence[Tensor], batch_dim: int | None) -> int | None:
    """Return how many samples a state has; None where leaves have no such dimension in common."""
    if batch_dim is None:
        return None
    if any(batch_dim not in range(-leaf.dim(), leaf.dim()) for leaf in leaves):
        return None
    sizes = {leaf.shape[batch_dim] for leaf in leaves}
    return sizes.pop() if len(sizes) == 1 else None


def _memory_order(leaf: Tensor, batch_dim: int | None) -> list[int]:
    strides = leaf.stride()
    dims = sorted(range(leaf.dim()), key=lambda dim: strides[dim], reverse=True)
    if batch_dim is not None:
        first = batch_dim % leaf.dim()
        dims.remove(first)
        dims.insert(0, first)
    return dims
