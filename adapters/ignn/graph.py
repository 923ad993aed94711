"""Weighted graphs as implicit layers need them: products along edges, and the largest eigenvalue.

A[i, j] is the weight of the edge from node i to node j: nodes collect from those that point at
them, on directed graphs too. In backward it is the other way round, a product with A; both are
kept as CSR matrices, made once a graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from deq_phantom_plugin.contract.state import ordinary

from .opaque import csr_product, parts_of
from .perron import PerronEigenvalue, csr


class Edges(NamedTuple):
    """The edges of a graph, each a column of three.

    Attributes:
        source: where edges begin, shape (E,).
        target: where they end, shape (E,).
        weight: of each edge, shape (E,); parallel edges add up.
        num_nodes: how many nodes there are.
    """

    source: Tensor
    target: Tensor
    weight: Tensor
    num_nodes: int


class Graph:
    """A weighted graph, ready for products with A^T and, in backward, with A.

    Args:
        source: where edges begin, shape (E,).
        target: where they end, shape (E,).
        weight: of each edge, shape (E,); parallel edges add up.
        num_nodes: how many nodes there are.

    Attributes:
        weight: as given; where it requires grad, products are differentiated with it.
        has_added_loops: whether a normalisation has put its self-loops, one per node, after the
            other edges.
        renew: computes the weights anew, None where they are those of the user. What they were
            computed by can be differentiated once.

    Raises:
        ValueError: if an edge ends outside the nodes, or a weight is NaN or infinite.
    """

    def __init__(self, source: Tensor, target: Tensor, weight: Tensor, num_nodes: int) -> None:
        check_edges(Edges(source, target, weight, num_nodes))
        self.num_nodes, self.has_added_loops = num_nodes, False
        self.renew: Callable[[], Tensor] | None = None
        # Ordinary tensors: a graph that is first seen in inference mode may be trained on later.
        with torch.inference_mode(False):
            source, target, weight = ordinary(source), ordinary(target), ordinary(weight)
            self.source, self.target, self.weight = source, target, weight
            self._values = weight.detach()
            if weight.requires_grad:  # and may be trained in place
                self._values = self._values.clone()
            self._incoming = _csr(target, source, self._values, num_nodes)
            self._outgoing = _csr(source, target, self._values, num_nodes)
            self._parts = parts_of(self._incoming), parts_of(self._outgoing)
        self._eigenvalue: list[PerronEigenvalue] = []  # shared with the graphs of `with_weight`

    def with_weight(self, weight: Tensor) -> Graph:
        """Return this graph with the same weights in another tensor, one that requires grad.

        Raises:
            ValueError: if they are not the same, but for rounding.
        """
        new, old = weight.detach(), self._values
        # Normalised anew on a GPU, they may differ in the last bits.
        rtol = 100 * torch.finfo(old.dtype).eps
        if new.shape != old.shape or not torch.allclose(new, old, rtol=rtol, atol=0):
            raise ValueError(
                "the weights of this Graph have changed since it was made, and it holds the old "
                "ones; make it anew, or pass edge_index and edge_weight in its place"
            )
        twin = copy.copy(self)
        twin.weight, twin.renew = weight, None
        return twin

    def current(self) -> Graph:
        """Return this graph for one more forward pass.

        Raises:
            ValueError: if its weights have been trained since it was made.
        """
        if not self.weight.requires_grad:
            return self
        return self.with_weight(self.weight if self.renew is None else self.renew())

    def propagate(self, x: Tensor, *, bias: Tensor | None = None) -> Tensor:
        """Return A^T x + bias: what nodes collect along their incoming edges.

        Differentiable to any order.

        Args:
            x: shape (num_nodes, channels); under autocast it may come in a lower precision.
            bias: shape (num_nodes, channels).
        """
        x = x.to(self.weight.dtype)
        return _propagate(x, self.weight, bias, self)

    def _product(self, x: Tensor, bias: Tensor | None, transpose: bool) -> Tensor:
        """Return A^T x + bias, or A x + bias, without autograd."""
        if torch.compiler.is_compiling():
            product: Tensor = csr_product(*self._parts[transpose], x, bias)
            return product
        matrix = self._outgoing if transpose else self._incoming
        # Sparse products know no lower precision.
        with torch.autocast(x.device.type, enabled=False):
            return matrix @ x if bias is None else torch.addmm(bias, matrix, x)

    @property
    def lambda_pf(self) -> Tensor:
        """The Perron-Frobenius eigenvalue of |A|, shape (): from above, see `PerronEigenvalue`.

        What is returned is never less, so that the layer is well-posed even where the iteration has
        not converged; on acyclic graphs it is 0. Computed once, and differentiable once in weights
        that require grad.
        """
        if not self._eigenvalue:
            with torch.inference_mode(False):  # kept, as the graph is
                self._eigenvalue.append(
                    PerronEigenvalue(self.target, self.source, self._values, self.num_nodes)
                )
        eigenvalue = self._eigenvalue[0]
        return eigenvalue.attached(self.weight) if self.weight.requires_grad else eigenvalue.value


def _propagate(x: Tensor, weight: Tensor, bias: Tensor | None, graph: Graph) -> Tensor:
    # Says what it takes to those that look for what F captures: a Function's `apply` does not.
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if has_torch_function(tensors):
        told: Tensor = handle_torch_function(_propagate, tensors, x, weight, bias, graph)
        return told
    out: Tensor = _Propagate.apply(x, weight, bias, graph, False)
    return out


class _Propagate(torch.autograd.Function):
    """A^T x + bias, or with A."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        graph: Graph,
        transpose: bool,
    ) -> Tensor:
        ctx.graph, ctx.transpose = graph, transpose
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return graph._product(x, bias, transpose)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        graph, transpose = ctx.graph, ctx.transpose
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _Propagate.apply(grad, weight, None, graph, not transpose)
        if ctx.needs_input_grad[1]:
            start, end = graph.source, graph.target
            if transpose:
                start, end = end, start
            grad_weight = (grad[end] * x[start]).sum(dim=1)
        return grad_x, grad_weight, grad if ctx.needs_input_grad[2] else None, None, None


def _csr(row: Tensor, column: Tensor, value: Tensor, size: int) -> Tensor:
    order = torch.argsort(row * size + column)
    return csr(row[order], column[order], value[order], size)


class LastGraph:
    """Keeps the last graph, so that training on one sorts its edges once.

    It is told by its contents: a tensor that was changed in place is still the same object, and
    `.data` hides the change from its version.
    """

    def __init__(self) -> None:
        self._last: tuple[Edges, Graph] | None = None

    def get(self, edges: Edges, make: Callable[[Edges], Graph]) -> Graph:
        """Return the graph of these edges: the last one, or what is made of them."""
        last = self._last  # once: threads of DataParallel share this object
        if last is None or not _are_equal(last[0], edges):
            with torch.inference_mode(False), torch.no_grad():  # ordinary tensors, without a graph
                source, target, weight = (tensor.detach().clone() for tensor in edges[:3])
                own = Edges(source, target, weight, edges.num_nodes)
                self._last = last = (own, make(own))
        return last[1]

    def __reduce__(self) -> tuple[type[LastGraph], tuple[()]]:
        return LastGraph, ()  # copies and pickles start empty


def _are_equal(first: Edges, second: Edges) -> bool:
    return first.num_nodes == second.num_nodes and all(
        a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
        for a, b in zip(first[:3], second[:3], strict=True)
    )


def parse_edges(edge_index: Any, edge_weight: Tensor | None, x: Tensor) -> Edges:
    """Return the edges of a graph, however PyG has them.

    Args:
        edge_index: (2, num_edges), as a tensor or `EdgeIndex`; or the matrix A^T, PyG's `adj_t`
            (its rows are targets), as a sparse tensor or `torch_sparse.SparseTensor`.
        edge_weight: shape (num_edges,); ones if None.
        x: node features, shape (num_nodes, channels), which give the dtype; weights have 32 bits
            at least, as sparse products know no fewer.

    Raises:
        ValueError: if shapes or types do not fit.
    """
    num_nodes, dtype = len(x), torch.promote_types(x.dtype, torch.float32)
    if isinstance(edge_index, Tensor) and edge_index.layout == torch.strided:
        if edge_index.dim() != 2 or edge_index.shape[0] != 2:
            raise ValueError(f"edge_index has shape {tuple(edge_index.shape)}; expected (2, edges)")
        if edge_index.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"edge_index has dtype {edge_index.dtype}; expected torch.int64")
        # EdgeIndex is a subclass that would check each operation on it.
        plain = edge_index.as_tensor() if hasattr(edge_index, "as_tensor") else edge_index
        source, target = plain.long()
    else:
        if edge_weight is not None:
            raise ValueError("edge_weight beside a sparse matrix; its values are the weights")
        if isinstance(edge_index, Tensor):
            size = edge_index.shape
            matrix = edge_index.to_sparse_coo().coalesce()
            (target, source), edge_weight = matrix.indices(), matrix.values()
        else:
            try:
                size = edge_index.sizes()
                target, source, edge_weight = edge_index.coo()  # torch_sparse.SparseTensor
            except AttributeError:
                raise ValueError(
                    f"edge_index is a {type(edge_index).__name__}; expected a tensor of shape "
                    "(2, edges), an EdgeIndex, or the sparse matrix adj_t"
                ) from None
        if list(size) != [num_nodes] * 2:
            raise ValueError(f"adj_t is {size[0]} x {size[1]}, but x has {num_nodes} nodes")
    if edge_weight is None:
        edge_weight = torch.ones(len(source), dtype=dtype, device=x.device)
    if edge_weight.shape != source.shape:
        raise ValueError(
            f"edge_weight has shape {tuple(edge_weight.shape)}; expected ({len(source)},), one "
            "number per edge"
        )
    return Edges(source, target, edge_weight.to(dtype), num_nodes)


def check_features(x: Any, channels: int) -> None:
    """Refuse what is no features of one set of nodes.

    Args:
        x: dense, or one of PyTorch's sparse tensors.
        channels: how many features each node has; -1 for any number.

    Raises:
        ValueError: if x is a pair, no tensor, of another shape or dtype, or holds NaN or infinite
            numbers.
    """
    expected = f"(num_nodes, {'channels' if channels == -1 else channels})"
    if isinstance(x, tuple | list):
        raise ValueError(
            "x is a pair (x_src, x_dst), the features of two node types (bipartite), as "
            "HeteroConv and to_hetero hand it to a layer between them. An implicit layer has one "
            "state for one set of nodes, and collects it again and again: expected one tensor and "
            "an edge type within one node type. HeteroData.to_homogeneous() makes one graph of all"
        )
    if isinstance(x, torch.fx.Proxy):
        raise ValueError(
            "x is a placeholder of torch.fx, by which to_hetero traces models; what an IGNN does "
            "depends on the graph, and cannot be traced. Make a model of IGNNConv layers: tracing "
            "does not look into layers"
        )
    if not isinstance(x, Tensor):
        raise ValueError(
            f"x is a {type(x).__name__}; expected a tensor of shape {expected}, dense or one of "
            "PyTorch's sparse ones (torch_sparse: x.to_torch_sparse_csr_tensor())"
        )
    if x.dim() != 2 or channels not in (-1, x.shape[1]):
        raise ValueError(f"x has shape {tuple(x.shape)}; expected {expected}")
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}; expected real floating-point numbers")
    values = x
    if x.layout != torch.strided:
        values = (x.coalesce() if x.layout == torch.sparse_coo else x).values()
    if not torch.isfinite(values).all():
        raise ValueError(f"x holds {int((~torch.isfinite(values)).sum())} NaN or infinite numbers")


def check_edges(edges: Edges) -> None:
    """Refuse edges that are not between nodes.

    Raises:
        ValueError: if an edge ends outside the nodes, or a weight is NaN or infinite.
    """
    source, target, weight, num_nodes = edges
    ends = torch.cat([source, target])
    if len(ends) and (ends.min() < 0 or ends.max() >= num_nodes):
        wrong = ends[(ends < 0) | (ends >= num_nodes)][0]
        raise ValueError(
            f"edge_index holds {int(wrong)}, but x has {num_nodes} nodes; expected 0 to "
            f"{num_nodes - 1}"
        )
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"edge_weight holds {int((~torch.isfinite(weight)).sum())} NaN or infinite numbers"
        )


def check_graph(graph: Graph, edge_weight: Tensor | None, x: Tensor) -> Graph:
    """Return a graph that was given in place of edges, for one more forward pass.

    Raises:
        ValueError: if there are weights beside it, or x has other nodes.
    """
    if edge_weight is not None:
        raise ValueError("edge_weight beside a Graph; its weights are in it")
    if graph.num_nodes != len(x):
        raise ValueError(f"the Graph has {graph.num_nodes} nodes, but x has {len(x)}")
    return graph.current()
