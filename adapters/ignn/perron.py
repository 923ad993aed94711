"""The largest eigenvalue of a non-negative matrix |A|, and its gradient in the entries of A.

Perron and Frobenius: this eigenvalue is real, and its vectors have no negative entries. It is the
largest of the eigenvalues of the strongly connected components of the graph. Within one component
the eigenvalue is simple and its vector is positive. So Collatz and Wielandt give bounds for the
matrix B of a component, with any positive x:

    min_i (B x)_i / x_i  <=  eigenvalue  <=  max_i (B x)_i / x_i.

This does not hold for a matrix of several components. Its vectors may have zeros. Power iteration
converges slowly if two components have close eigenvalues, and hardly at all if one of these feeds
the other. So the components are separated first. Power iteration then runs on all of them at once,
and components whose upper bound is too low are dropped.
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

_STEPS = 20  # steps of power iteration per turn; reading the bounds after it waits for the device
_PLAIN_TURNS = 5  # turns before `_improved` is called; they are enough for most graphs
_MAX_TURNS = 30  # the largest number of turns
_LARGEST_DENSE = 1000  # rows of the largest component that is solved as a dense matrix
_MOST_NUMBERS = 2**24  # numbers in all dense matrices, or in all Krylov spaces, together
_BASIS = 40  # vectors of a Krylov space
_SMALLEST = 1e-250  # entry of a vector; _STEPS steps shrink it by 3^-_STEPS at most


class PerronEigenvalue:
    """An upper bound of the Perron-Frobenius eigenvalue of |A|, and its gradient.

    Args:
        row: the row of each entry of A, shape (E,).
        column: the column of each entry, shape (E,).
        weight: the value of each entry, shape (E,). Entries in the same place add up before the
            magnitude is taken.
        size: the number of rows, and of columns.

    Attributes:
        value: the bound, shape (), in the dtype of the weights. It is never below the eigenvalue.
            It exceeds the eigenvalue by rounding only, if the iteration has converged. It is 0 if
            the graph has no cycles.
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
        """Return the eigenvalue attached to the weights; it can be differentiated once.

        Args:
            weight: the values of the entries, shape (E,), in a tensor that requires grad.
        """
        if self._found is None:
            return self.value  # without cycles it is 0, whatever the weights are
        value: Tensor = _Attached.apply(weight, self)
        return value

    @property
    def slope(self) -> Tensor:
        """The derivative with respect to each weight, in float64, shape (E,); computed once.

        With the left and right eigenvectors u and v, the derivative with respect to |A|_ij is
        u_i v_j / (u . v). If two components have the same eigenvalue, there is a kink, and this is
        the derivative of one of them.
        """
        if self._slope is None:
            assert self._found is not None
            inside, gap = _slope(self._matrix, self._found, self._size)
            gap = max(gap, self._found.gap)
            if gap > 1e-8:
                warn_once(
                    "lambda_pf",
                    "the gradient of lambda_pf in the edge weights may be inaccurate: on this "
                    f"graph its eigenvectors have only converged to {gap:.1e}. Pass lambda_pf if "
                    "it is known, or normalise the graph. This warning is given once.",
                    ConvergenceWarning,
                )
            slope = torch.zeros_like(self._sign)
            slope[self._there] = inside
            self._slope = (slope * self._sign)[self._place]
        return self._slope


class _Attached(torch.autograd.Function):
    """Returns the value of a `PerronEigenvalue`; its backward pass multiplies by the slope."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, eigenvalue: PerronEigenvalue) -> Tensor:
        ctx.eigenvalue = eigenvalue
        return eigenvalue.value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "a second derivative was asked for (create_graph=True) through lambda_pf, the "
                "Perron-Frobenius eigenvalue of the edge weights, which has first derivatives "
                "only. Differentiate with respect to other tensors, or pass lambda_pf as a number, "
                "which is a constant"
            )
        return (grad * ctx.eigenvalue.slope).to(grad.dtype), None


@dataclass(frozen=True, eq=False)
class _Entries:
    """The positive entries of a matrix, at most one per place, in order of their rows."""

    row: Tensor
    column: Tensor
    value: Tensor


@dataclass(frozen=True, eq=False)
class _Leading:
    """The leading eigenvalue of a matrix B.

    Attributes:
        bound: an upper bound of the eigenvalue, in float64, shape ().
        gap: how far the bound may be above the eigenvalue, relative to the bound.
        nodes: the indices of the rows of its component, ascending, shape (n,).
        vector: the positive x with B x = bound x in this component, shape (n,).
    """

    bound: Tensor
    gap: float
    nodes: Tensor
    vector: Tensor


@dataclass(frozen=True, eq=False)
class _Blocks:
    """Some components of a matrix.

    Attributes:
        row: the row of each entry that lies within a component, shape (E,).
        column: the column of each entry, shape (E,).
        value: the value of each entry, shape (E,).
        labels: the component of each row, shape (n,).
        nodes: the index of each row in the whole matrix, shape (n,).
        x: a positive vector, shape (n,).
    """

    row: Tensor
    column: Tensor
    value: Tensor
    labels: Tensor
    nodes: Tensor
    x: Tensor

    def kept(self, which: Tensor) -> _Blocks:
        """Return the components that a mask selects, numbered anew."""
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
        """Return the largest number of each component, from one number per row."""
        out = numbers.new_empty(int(self.labels.amax()) + 1)
        return out.scatter_reduce(0, self.labels, numbers, "amax", include_self=False)


def _leading(matrix: _Entries, labels: Tensor) -> _Leading | None:
    """Find the leading eigenvalue by power iteration on all components at once.

    A component is dropped once its upper bound is below the lower bound of another one. `_power`
    adds a multiple of the identity, so that the iteration converges on periodic matrices, such as
    those of bipartite graphs.

    Args:
        matrix: B.
        labels: the component of each row, shape (size,).

    Returns:
        The leading eigenvalue, or None if there are no cycles.
    """
    inside = labels[matrix.row] == labels[matrix.column]
    row, column, value = (part[inside] for part in (matrix.row, matrix.column, matrix.value))
    if len(value) == 0:
        return None
    # Rounding keeps the two bounds apart by about this much.
    tol = torch.finfo(value.dtype).eps * (4096 + int(torch.bincount(row).amax()))
    scale = value.amax()  # it is divided out, so that nothing overflows
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
    first[upper.argmax()] = True  # one of the components that share the eigenvalue
    found = blocks.kept(first)
    return _Leading(bound * scale, gap, found.nodes, found.x)


def _power(blocks: _Blocks, krylov: bool) -> tuple[Tensor, Tensor]:
    """Return x after some steps of power iteration, and the ratios (B x)_i / x_i at the last one.

    A step is x <- (B + s I) x, with s half of the largest ratio.
    """
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
    """Return a better x if power iteration is slow.

    The leading eigenvectors are computed of the scaled matrix D^-1 B D with D = diag(x). Their
    entries are close to one, so small entries of x become as accurate as large ones. A vector that
    is not positive has not converged; then the x of its component stays as it was.
    """
    # With c components of at most m rows, `slot` numbers the rows within each component. `ones` has
    # the shape (c, m), and is 1 where a component has a row.
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
        # One step of inverse iteration with the upper bound as its shift: Noda, "Note on the
        # computation of the maximal eigenvalue of a non-negative irreducible matrix", 1971.
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
    converged = -blocks.most(-z) > 0  # this is false for NaN, too
    z = torch.where(converged[labels], z, 1)
    return x * z / blocks.most(z)[labels]


def _slope(matrix: _Entries, found: _Leading, size: int) -> tuple[Tensor, float]:
    """Return the derivative of the eigenvalue in each entry, and the gap of the left vector.

    Let u and v be the left and right eigenvectors of B. The derivative in B_ij is
    u_i v_j / (u . v). The entries of u and v may differ by too many orders of magnitude for these
    products. So B is scaled by its right vector, D^-1 B D with D = diag(v). The left vector p of
    the scaled matrix has p_i = u_i v_i, and the derivative is p_i / (sum of p) times v_j / v_i.
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

    The algorithm is that of Tarjan, "Depth-first search and linear graph algorithms", 1972, written
    without recursion.
    """
    ends = torch.bincount(matrix.row, minlength=size).cumsum(0).tolist()
    following = matrix.column.tolist()
    edges = [0, *ends[:-1]]  # the next edge of each node to look at
    index = [-1] * size  # the order in which nodes are discovered
    low = [0] * size  # the earliest node that is known to be in the same component
    label = [-1] * size
    waiting: list[int] = []  # nodes that are discovered and not in a component yet
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
    """Return a square CSR matrix from entries that are in order of their rows."""
    pointers = F.pad(torch.bincount(row, minlength=size).cumsum(0), (1, 0))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        # Several entries in one place stay apart. Products are right all the same, but the checks
        # of invariants would refuse them.
        return torch.sparse_csr_tensor(
            pointers, column, value, size=(size, size), check_invariants=False
        )
