"""Exact: the dense Jacobian, solved directly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._plumbing.transforms import as_constants, in_transform
from ..adjoint import Linearization, Packing, Pushforward, mixes_samples, relative_norm
from ..contract.state import State
from ..contract.strategy import BackwardStats, Context, GradStrategy
from .registry import register_strategy

_LIMIT = 2**30  # bytes that the dense Jacobians of a batch may take


@register_strategy("exact")
@dataclass(frozen=True, repr=False)
class Exact(GradStrategy):
    """The implicit gradient from dense Jacobians: g solves (I - J^T) g = v directly.

    This is the reference of diagnostics and tests. The value is F(h*).

    With d elements per sample it costs one evaluation of F, d vector-Jacobian products, and some
    more products that tell whether samples are independent (7 for 32 samples). Memory holds d^2
    numbers per sample. Inside `torch.func` and in forward mode the state is one system, and the
    context's monitor is told nothing.

    Raises:
        ValueError: in backward, if the Jacobians would take more than 1 GiB, or if samples that
            were said to be independent are not.
    """

    def attach(self, func: Callable[[State], State], equilibrium: State, context: Context) -> State:
        """See `GradStrategy.attach`."""
        if in_transform():
            return self._attach_by_change(func, equilibrium)
        graph = Linearization(func, equilibrium, self)
        batch_dim, monitor = context.sample_dim, context.monitor

        def adjoint(v: list[Tensor]) -> list[Tensor]:
            packing = Packing(v, batch_dim)
            if mixes_samples(graph, packing):
                if context.memory is not None:
                    context.memory.findings.clear()
                raise ValueError(
                    "exact: the samples depend on one another (a graph's nodes, batch norm inside "
                    "F, a state without a batch dimension), so a Jacobian per sample would give a "
                    "wrong gradient; pass batch_dim=None in the context. With batch_dim='auto' "
                    "they were independent before: the next step finds out anew"
                )
            transposed = _transposed_jacobians(graph, packing)
            rhs = packing.pack(v)
            identity = torch.eye(packing.columns, dtype=rhs.dtype, device=rhs.device)
            g = torch.linalg.solve(identity - transposed, rhs[:, :, None]).squeeze(2)
            if monitor is not None:
                image = (transposed @ g[:, :, None]).squeeze(2)
                residual = relative_norm(rhs - g + image, rhs)
                monitor(BackwardStats(repr(self), packing.columns, residual, residual[:, None]))
            return packing.unpack(torch.where(torch.isfinite(rhs).all(1, keepdim=True), g, rhs))

        return graph.attach(graph.outputs, adjoint)

    def _attach_by_change(self, func: Callable[[State], State], equilibrium: State) -> State:
        push = Pushforward(func, equilibrium, self)
        packing = Packing(push.inputs, None)
        _check_size(packing)
        identity = torch.eye(packing.columns, dtype=packing.dtype, device=packing.device)
        columns = [packing.pack(push(packing.unpack(unit[None])))[0] for unit in identity]
        (jacobian,) = as_constants([torch.stack(columns, dim=1)])
        change = torch.linalg.solve(identity - jacobian, packing.pack(push.change)[0])
        return push.attach(push.outputs, packing.unpack(change[None]))


def _transposed_jacobians(graph: Linearization, packing: Packing) -> Tensor:
    """Return J^T of each sample, shape (B, D, D): column i is J^T e_i."""
    _check_size(packing)
    rows, size = packing.rows, packing.columns
    result = torch.empty(rows, size, size, dtype=packing.dtype, device=packing.device)
    unit = torch.zeros(rows, size, dtype=packing.dtype, device=packing.device)
    for i in range(size):
        unit[:, i] = 1
        result[:, :, i] = packing.pack(graph.vjp(packing.unpack(unit)))
        unit[:, i] = 0
    return result


def _check_size(packing: Packing) -> None:
    """Refuse Jacobians of more than `_LIMIT` bytes."""
    rows, size = packing.rows, packing.columns
    needed = rows * size * size * packing.dtype.itemsize
    if needed > _LIMIT:
        raise ValueError(
            f"exact needs {needed / 2**30:.1f} GiB for the dense Jacobians of {rows} samples of "
            f"{size} elements; it is for states of at most 1 GiB. Use 'ift' with a tight tol"
        )
