"""The largest eigenvalue of a matrix of magnitudes |A|, and its gradient in the entries of A.

Perron and Frobenius: the eigenvalue is real, its vectors have no negative entries, and it is the
largest of those of the strongly connected components. In each component it is simple and its vector
is positive; by Collatz and Wielandt then, for any positive x,

    min_i (B x)_i / x_i  <=  eigenvalue  <=  max_i (B x)_i / x_i.

A matrix of several components has none of this: its vectors hold zeros, eigenvalues that are close
hold one another up, and where one component feeds another like it, power iteration hardly moves.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deq_phantom_plugin._plumbing.once import warn_once
from deq_phantom_plugin.adjoint.spectrum import leading_eigenvalue
from deq_phantom_plugin.contract.errors import ConvergenceWarning

_STEPS = 20  # of power iteration between two looks at the bounds, which wait for the device
_PLAIN_TURNS = 5  # with nothing else, which is enough for most graphs
_MAX_TURNS = 30
_LARGEST_DENSE = 1000  # rows
_MOST_NUMBERS = 2**24  # in all dense matrices, or all Krylov spaces, together
_BASIS = 40
_SMALLEST = 1e-250  # entry of a vector: _STEPS make it smaller by 3^-_STEPS at most


class PerronEigenvalue:
    """The Perron-Frobenius eigenvalue of |A|, from above, and its gradient.

    Args:
        row: of each entry of A, shape (E,).
        column: of each entry, shape (E,).
        weight: of each entry, shape (E,); those in one place add up before the magnitude is taken.
        size: how many rows and columns there are.

    Attributes:
        value: no less than the eigenvalue, and no more than it by more than rounding where the
            iteration has converged; 0 where there are no cycles. Of the dtype of the weights.
    """

    def __init__(self, row: Tensor, column: Tensor, weight: Tensor, size: int) -> None:
        places, self._place = torch.unique(row * size + column, return_inverse=True)
        summed = torch.zeros(len(places), dtype=torch.float64, device=weight.device)
        summed.index_add_(0, self._place, weight.detach().double())
        self._sign = summed.sign()
        there = summed != 0
        places = places[there]
        self._matrix = _Entries(places // max(size, 1), places % max(size, 1), summed[there].abs())
        self._there, self._size = there, size
        labels = _components(self._matrix, size)
        self._found = _leading(self._matrix, labels)
        self.value = weight.new_zeros(())
        if self._found is not None:
            self.value = self._found.bound.to(weight.dtype)
        self._slope: Tensor | None = None

    def attached(self, weight: Tensor) -> Tensor:
        """Return the eigenvalue attached to the weights; once differentiable.

        Args:
            weight: those of the entries, in a tensor that requires grad.
        """
        if self._found is None:
            return self.value  # whatever the weights are
        value: Tensor = _Attached.apply(weight, self)
        return value

    @property
    def slope(self) -> Tensor:
        """The derivative in each weight, in float64, shape (E,); computed once.

        With left and right vectors u and v it is u_i v_j / (u . v) for |A|_ij. Where two components
        have the same eigenvalue it is that of one of them: there is a kink.
        """
        if self._slope is None:
            assert self._found is not None
            inside, gap = _slope(self._matrix, self._found, self._size)
            gap = max(gap, self._found.gap)
            if gap > 1e-8:
                warn_once(
                    "lambda_pf",
                    "the gradient of lambda_pf in the edge weights may be off: on this graph its "
                    f"vectors have converged to {gap:.1e} only. Pass lambda_pf where it is known, "
                    "or normalise the graph. This warning is given once.",
                    ConvergenceWarning,
                )
            slope = torch.zeros_like(self._sign)
            slope[self._there] = inside
            self._slope = (slope * self._sign)[self._place]
        return self._slope


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, eigenvalue: PerronEigenvalue) -> Tensor:
        ctx.eigenvalue = eigenvalue
        return eigenvalue.value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "a second derivative was asked for (create_graph=True) through lambda_pf, the "
                "Perron-Frobenius eigenvalue of the edge weights, which gives first derivatives "
                "only. Ask for it in other tensors, or pass lambda_pf as a number, which is "
                "constant"
            )
        return (grad * ctx.eigenvalue.slope).to(grad.dtype), None


@dataclass(frozen=True, eq=False)
class _Entries:
    """The entries of a matrix, above 0, no two in one place, in order of their rows."""

    row: Tensor
    column: Tensor
    value: Tensor


@dataclass(frozen=True, eq=False)
class _Leading:
    """The leading eigenvalue of a matrix B.

    Attributes:
        bound: no less than the eigenvalue, in float64, shape ().
        gap: by how much it may be more, in parts of it.
        nodes: the indices of its component, ascending, shape (n,).
        vector: the x with B x = bound x there, positive, shape (n,).
    """

    bound: Tensor
    gap: float
    nodes: Tensor
    vector: Tensor


@dataclass(frozen=True, eq=False)
class _Blocks:
    """Some components of a matrix: the entries inside them, and a positive x."""

    row: Tensor
    column: Tensor
    value: Tensor
    labels: Tensor
    nodes: Tensor
    x: Tensor

    def kept(self, which: Tensor) -> _Blocks:
        """Return those of a mask."""
        nodes, entries = which[self.labels], which[self.labels[self.row]]
        place, number = nodes.cumsum(0) - 1, which.cumsum(0) - 1
        return _Blocks(
            place[self.row[entries]],
            place[self.column[entries]],
            self.value[entries],
            number[self.labels[nodes]],
            self.nodes[nodes],
            self.x[nodes],
        )

    def most(self, numbers: Tensor) -> Tensor:
        """Return the largest of each component's numbers."""
        out = numbers.new_empty(int(self.labels.amax()) + 1)
        return out.scatter_reduce(0, self.labels, numbers, "amax", include_self=False)


def _leading(matrix: _Entries, labels: Tensor) -> _Leading | None:
    """Find the leading eigenvalue by power iteration on all components at once.

    Components that cannot have it are dropped on the way. Adding a multiple of the identity lets
    it converge on periodic matrices, such as those of bipartite graphs.

    Args:
        matrix: B.
        labels: the component of each row.

    Returns:
        What was found, None where there are no cycles.
    """
    inside = labels[matrix.row] == labels[matrix.column]
    row, column, value = (part[inside] for part in (matrix.row, matrix.column, matrix.value))
    if len(value) == 0:
        return None
    # Rounding lets the bounds come no closer than this.
    tol = torch.finfo(value.dtype).eps * (4096 + int(torch.bincount(row).amax()))
    scale = value.amax()  # taken out, so that nothing overflows
    every = torch.arange(len(labels), device=labels.device)
    blocks = _Blocks(row, column, value / scale, labels, every, value.new_ones(len(labels)))
    for turn in range(_MAX_TURNS):
        x, ratio = _power(blocks, krylov=turn > _PLAIN_TURNS)
        x = x / blocks.most(x)[blocks.labels]
        blocks = replace(blocks, x=x.clamp_min(_SMALLEST))
        upper, lower = blocks.most(ratio), -blocks.most(-ratio)
        bound, least = upper.amax(), lower.amax()
        gap = float((bound - least) / bound)
        if gap <= tol:
            break
        blocks, upper = blocks.kept(upper >= least), upper[upper >= least]
    first = torch.zeros_like(upper, dtype=torch.bool)
    first[upper.argmax()] = True  # of those that have the same
    found = blocks.kept(first)
    return _Leading(bound * scale, gap, found.nodes, found.x)


def _power(blocks: _Blocks, krylov: bool) -> tuple[Tensor, Tensor]:
    """Return x after some steps, and the ratios (B x)_i / x_i before the last one."""
    matrix = csr(blocks.row, blocks.column, blocks.value, len(blocks.nodes))
    x = ratio = blocks.x
    if krylov:
        x = _improved(blocks)
    for _ in range(_STEPS):
        y = matrix @ x
        ratio = y / x
        x = torch.addcmul(y, ratio.amax() / 2, x)
        x = x / x.amax()
    return x, ratio


def _improved(blocks: _Blocks) -> Tensor:
    """Return a better x, for where power iteration is slow.

    Of the matrix scaled by x, D^-1 B D with D = diag(x), the leading vectors are close to one
    everywhere, so that small entries of x become as accurate as large ones. A vector that is not
    positive has not converged, and leaves its component's x as it was.
    """
    row, column, labels, x = blocks.row, blocks.column, blocks.labels, blocks.x
    scaled = blocks.value * x[column] / x[row]
    sizes = torch.bincount(labels)
    order = labels.argsort(stable=True)
    slot = torch.empty_like(order)
    slot[order] = torch.arange(len(x), device=x.device) - (sizes.cumsum(0) - sizes)[labels[order]]
    most = int(sizes.amax())
    ones = x.new_zeros(len(sizes), most)
    ones[labels, slot] = 1
    if most <= _LARGEST_DENSE and most * ones.numel() <= _MOST_NUMBERS:
        # Inverse iteration with the bound as its shift: Noda, "Note on the computation of the
        # maximal eigenvalue of a non-negative irreducible matrix", 1971.
        bound = blocks.most(torch.zeros_like(x).index_add(0, row, scaled))
        dense = bound[:, None, None] * torch.eye(most, dtype=x.dtype, device=x.device)
        dense[labels[row], slot[row], slot[column]] -= scaled
        vectors = torch.linalg.solve_ex(dense, ones[:, :, None]).result.squeeze(2)
    else:
        basis = min(_BASIS, _MOST_NUMBERS // ones.numel())
        if basis < 3:
            return x
        matrix = csr(row, column, scaled, len(x))
        shift = (matrix @ torch.ones_like(x)).amax() / 2

        def apply(rows: Tensor) -> Tensor:
            z = rows[labels, slot]
            image = torch.zeros_like(rows)
            image[labels, slot] = torch.addcmul(matrix @ z, shift, z)
            return image

        found = leading_eigenvalue(apply, ones, tol=0.0, max_vjp=basis, basis=basis)
        vectors = found.vector * found.vector.sum(dim=1, keepdim=True).sign()
    z = vectors[labels, slot]
    converged = -blocks.most(-z) > 0  # false for NaN, too
    z = torch.where(converged[labels], z, 1)
    return x * z / blocks.most(z)[labels]


def _slope(matrix: _Entries, found: _Leading, size: int) -> tuple[Tensor, float]:
    """Return the derivative of the eigenvalue in each entry, and the gap of the left vector.

    The matrix scaled by its right vector has a left vector p with p_i = u_i v_i: its products are
    taken without u and v, whose entries may lie too far apart for that.
    """
    place = matrix.row.new_full((size,), -1)
    place[found.nodes] = torch.arange(len(found.nodes), device=place.device)
    row, column = place[matrix.row], place[matrix.column]
    inside = (row >= 0) & (column >= 0)
    row, column, x = row[inside], column[inside], found.vector
    ratio = x[column] / x[row]
    order = column.argsort(stable=True)
    scaled = (matrix.value[inside] * ratio)[order]
    left = _leading(_Entries(column[order], row[order], scaled), torch.zeros_like(found.nodes))
    assert left is not None
    p = left.vector / left.vector.sum()
    slope = torch.zeros_like(matrix.value)
    slope[inside] = p[row] * ratio
    return slope, left.gap


def _components(matrix: _Entries, size: int) -> Tensor:
    """Return the strongly connected component of each row, counted from 0, shape (size,).

    Tarjan, "Depth-first search and linear graph algorithms", 1972, without recursion.
    """
    ends = torch.bincount(matrix.row, minlength=size).cumsum(0).tolist()
    following = matrix.column.tolist()
    edges = [0, *ends[:-1]]  # the one to look at next, of each node
    index = [-1] * size  # in order of discovery
    low = [0] * size  # the earliest node that is known to be in the same component
    label = [-1] * size
    waiting: list[int] = []  # discovered, and in no component yet
    discovered = found = 0
    for root in range(size):
        path = [root] if index[root] < 0 else []
        while path:
            node = path[-1]
            if index[node] < 0:
                index[node] = low[node] = discovered
                discovered += 1
                waiting.append(node)
            edge, end = edges[node], ends[node]
            while edge < end:
                other = following[edge]
                if index[other] < 0:
                    path.append(other)
                    break
                if label[other] < 0 and low[other] < low[node]:
                    low[node] = low[other]
                edge += 1
            edges[node] = edge
            if edge == end:
                path.pop()
                if low[node] == index[node]:
                    while label[node] < 0:
                        label[waiting.pop()] = found
                    found += 1
    return torch.tensor(label, dtype=torch.long, device=matrix.row.device)


def csr(row: Tensor, column: Tensor, value: Tensor, size: int) -> Tensor:
    """Return a sparse matrix of entries that are in order of their rows."""
    pointers = F.pad(torch.bincount(row, minlength=size).cumsum(0), (1, 0))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        # Entries in one place are kept apart, which the invariants forbid and products do not mind.
        return torch.sparse_csr_tensor(
            pointers, column, value, size=(size, size), check_invariants=False
        )
