"""Products of sparse matrices for `torch.compile`, which takes no sparse tensors."""

from __future__ import annotations

import torch
from torch import Tensor

Parts = tuple[Tensor, Tensor, Tensor]
"""Row pointers, columns and values of a CSR matrix."""


def parts_of(matrix: Tensor) -> Parts:
    """Return a square CSR matrix as dense tensors."""
    return matrix.crow_indices(), matrix.col_indices(), matrix.values().detach()


@torch.library.custom_op("deq_phantom_plugin::csr_product", mutates_args=())
def csr_product(
    rows: Tensor, columns: Tensor, values: Tensor, x: Tensor, bias: Tensor | None
) -> Tensor:
    """Return the product of a square CSR matrix and a dense one, plus the bias if there is one."""
    size = (len(rows) - 1, len(rows) - 1)
    matrix = torch.sparse_csr_tensor(rows, columns, values, size, check_invariants=False)
    with torch.autocast(x.device.type, enabled=False):  # sparse products know no lower precision
        return matrix @ x if bias is None else torch.addmm(bias, matrix, x)


@csr_product.register_fake
def _(rows: Tensor, columns: Tensor, values: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)
