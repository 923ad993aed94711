"""Products with sparse matrices under `torch.compile`, which does not accept sparse tensors.

The matrix is passed as three dense tensors to a custom operator, which the compiler does not enter.
"""

from __future__ import annotations

import torch
from torch import Tensor

Parts = tuple[Tensor, Tensor, Tensor]
"""Row pointers, columns and values of a CSR matrix."""


def parts_of(matrix: Tensor) -> Parts:
    """Return the row pointers, columns and values of a square CSR matrix."""
    return matrix.crow_indices(), matrix.col_indices(), matrix.values().detach()


@torch.library.custom_op("deq_phantom_plugin::csr_product", mutates_args=())
def csr_product(
    rows: Tensor, columns: Tensor, values: Tensor, x: Tensor, bias: Tensor | None
) -> Tensor:
    """Return the product of a square CSR matrix and x, plus the bias if there is one.

    Args:
        rows: row pointers, shape (num_nodes + 1,).
        columns: columns of the entries, shape (E,).
        values: values of the entries, shape (E,).
        x: shape (num_nodes, channels).
        bias: shape (num_nodes, channels), or None.
    """
    size = (len(rows) - 1, len(rows) - 1)
    matrix = torch.sparse_csr_tensor(rows, columns, values, size, check_invariants=False)
    with torch.autocast(x.device.type, enabled=False):  # see Graph._product
        return matrix @ x if bias is None else torch.addmm(bias, matrix, x)


@csr_product.register_fake
def _(rows: Tensor, columns: Tensor, values: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)
