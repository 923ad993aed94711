"""Weighted graphs as implicit layers need them.

A `Graph` multiplies states by its adjacency matrix, and knows the largest eigenvalue of |A|.
A[i, j] is the weight of the edge from node i to node j, so A^T x collects along incoming edges. The
backward pass of that product multiplies by A. Both matrices are kept in CSR format, and are built
once per graph. The functions below parse and check the edges as PyG passes them.
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
    """The edges of a graph.

    Attributes:
        source: the node at which each edge begins, shape (E,).
        target: the node at which each edge ends, shape (E,).
        weight: the weight of each edge, shape (E,). The weights of parallel edges add up.
        num_nodes: the number of nodes.
    """

    source: Tensor
    target: Tensor
    weight: Tensor
    num_nodes: int


class Graph:
    """A weighted graph, ready for products with A^T and, in backward, with A.

    Args:
        source: the node at which each edge begins, shape (E,).
        target: the node at which each edge ends, shape (E,).
        weight: the weight of each edge, shape (E,). The weights of parallel edges add up.
        num_nodes: the number of nodes.

    Attributes:
        weight: the weights as given. If they require grad, products are differentiated with
            respect to them.
        has_added_loops: whether a normalisation has appended self-loops, one per node, after the
            other edges.
        renew: computes the weights again from their inputs. A forward pass after the first needs
            that, since the graph of the first computation can be differentiated only once. None if
            the weights are the user's own.

    Raises:
        ValueError: if an edge ends outside the nodes, or a weight is NaN or infinite.
    """

    def __init__(self, source: Tensor, target: Tensor, weight: Tensor, num_nodes: int) -> None:
        check_edges(Edges(source, target, weight, num_nodes))
        self.num_nodes, self.has_added_loops = num_nodes, False
        self.renew: Callable[[], Tensor] | None = None
        # The tensors must not be inference tensors: a graph that is first used in inference mode
        # may be trained on later.
        with torch.inference_mode(False):
            source, target, weight = ordinary(source), ordinary(target), ordinary(weight)
            self.source, self.target, self.weight = source, target, weight
            self._values = weight.detach()
            if weight.requires_grad:  # an optimiser may change it in place
                self._values = self._values.clone()
            self._incoming = _csr(target, source, self._values, num_nodes)
            self._outgoing = _csr(source, target, self._values, num_nodes)
            self._parts = parts_of(self._incoming), parts_of(self._outgoing)
        self._eigenvalue: list[PerronEigenvalue] = []  # shared with the graphs of `with_weight`

    def with_weight(self, weight: Tensor) -> Graph:
        """Return this graph with its weights in another tensor, which may require grad.

        Args:
            weight: the same weights, shape (E,).

        Raises:
            ValueError: if the weights differ by more than rounding.
        """
        new, old = weight.detach(), self._values
        # Weights that a GPU has normalised again may differ in their last bits.
        rtol = 100 * torch.finfo(old.dtype).eps
        if new.shape != old.shape or not torch.allclose(new, old, rtol=rtol, atol=0):
            raise ValueError(
                "the weights of this Graph have changed since it was made, so its matrices are out "
                "of date. Make a new Graph, or pass edge_index and edge_weight in its place"
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
        """Return A^T x + bias, shape (num_nodes, channels); differentiable to any order.

        Args:
            x: shape (num_nodes, channels). Under autocast it may have a lower precision.
            bias: shape (num_nodes, channels), or None.
        """
        x = x.to(self.weight.dtype)
        return _propagate(x, self.weight, bias, self)

    def _product(self, x: Tensor, bias: Tensor | None, transpose: bool) -> Tensor:
        """Return A^T x + bias, or A x + bias, without autograd."""
        if torch.compiler.is_compiling():
            product: Tensor = csr_product(*self._parts[transpose], x, bias)
            return product
        matrix = self._outgoing if transpose else self._incoming
        # Sparse products are not implemented in a lower precision.
        with torch.autocast(x.device.type, enabled=False):
            return matrix @ x if bias is None else torch.addmm(bias, matrix, x)

    @property
    def lambda_pf(self) -> Tensor:
        """An upper bound of the Perron-Frobenius eigenvalue of |A|, shape ().

        The bound equals the eigenvalue up to rounding once its iteration has converged, see
        `PerronEigenvalue`. It is never below the eigenvalue, so the layer is well-posed in any
        case. For an acyclic graph it is 0. It is computed once, and can be differentiated once
        with respect to weights that require grad.
        """
        if not self._eigenvalue:
            with torch.inference_mode(False):  # it is kept, and may be differentiated later
                self._eigenvalue.append(
                    PerronEigenvalue(self.target, self.source, self._values, self.num_nodes)
                )
        eigenvalue = self._eigenvalue[0]
        return eigenvalue.attached(self.weight) if self.weight.requires_grad else eigenvalue.value


def _propagate(x: Tensor, weight: Tensor, bias: Tensor | None, graph: Graph) -> Tensor:
    # Modes that look for the tensors which F captures see this call. They do not see the `apply` of
    # an autograd function.
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if has_torch_function(tensors):
        told: Tensor = handle_torch_function(_propagate, tensors, x, weight, bias, graph)
        return told
    out: Tensor = _Propagate.apply(x, weight, bias, graph, False)
    return out


class _Propagate(torch.autograd.Function):
    """Computes A^T x + bias, or A x + bias if `transpose` is set."""

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
    """Return a square CSR matrix from entries in any order."""
    order = torch.argsort(row * size + column)
    return csr(row[order], column[order], value[order], size)


class LastGraph:
    """Keeps the last graph, so that training on one graph sorts its edges only once.

    Edges are compared by their values. Comparing tensor objects or versions would not be safe: a
    tensor that was changed in place is the same object, and a change through `.data` does not
    increase its version.
    """

    def __init__(self) -> None:
        self._last: tuple[Edges, Graph] | None = None

    def get(self, edges: Edges, make: Callable[[Edges], Graph]) -> Graph:
        """Return the last graph if it has these edges, or a new one that `make` builds."""
        last = self._last  # read once, since threads of DataParallel share this object
        if last is None or not _are_equal(last[0], edges):
            with torch.inference_mode(False), torch.no_grad():  # see Graph.__init__
                source, target, weight = (tensor.detach().clone() for tensor in edges[:3])
                own = Edges(source, target, weight, edges.num_nodes)
                self._last = last = (own, make(own))
        return last[1]

    def __reduce__(self) -> tuple[type[LastGraph], tuple[()]]:
        return LastGraph, ()  # copies and pickles begin without a graph


def _are_equal(first: Edges, second: Edges) -> bool:
    return first.num_nodes == second.num_nodes and all(
        a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
        for a, b in zip(first[:3], second[:3], strict=True)
    )


def parse_edges(edge_index: Any, edge_weight: Tensor | None, x: Tensor) -> Edges:
    """Return the edges of a graph, in whichever format PyG passes them.

    Args:
        edge_index: shape (2, num_edges), as a tensor or `EdgeIndex`; or the matrix A^T, PyG's
            `adj_t` (its rows are targets), as a sparse tensor or `torch_sparse.SparseTensor`.
        edge_weight: shape (num_edges,); ones if None.
        x: node features, shape (num_nodes, channels). The weights get their dtype, but at least 32
            bits, since sparse products are not implemented with fewer.

    Raises:
        ValueError: if shapes or types do not fit.
    """
    num_nodes, dtype = len(x), torch.promote_types(x.dtype, torch.float32)
    if isinstance(edge_index, Tensor) and edge_index.layout == torch.strided:
        if edge_index.dim() != 2 or edge_index.shape[0] != 2:
            raise ValueError(f"edge_index has shape {tuple(edge_index.shape)}; expected (2, edges)")
        if edge_index.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"edge_index has dtype {edge_index.dtype}; expected torch.int64")
        # EdgeIndex is a subclass of Tensor that would check each operation.
        plain = edge_index.as_tensor() if hasattr(edge_index, "as_tensor") else edge_index
        source, target = plain.long()
    else:
        if edge_weight is not None:
            raise ValueError(
                "edge_weight beside a sparse matrix; expected None, since the values of the matrix "
                "are the weights"
            )
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
            raise ValueError(
                f"adj_t is {size[0]} x {size[1]}, but x has {num_nodes} nodes; expected "
                f"{num_nodes} x {num_nodes}"
            )
    if edge_weight is None:
        edge_weight = torch.ones(len(source), dtype=dtype, device=x.device)
    if edge_weight.shape != source.shape:
        raise ValueError(
            f"edge_weight has shape {tuple(edge_weight.shape)}; expected ({len(source)},), one "
            "number per edge"
        )
    return Edges(source, target, edge_weight.to(dtype), num_nodes)


def check_features(x: Any, channels: int) -> None:
    """Refuse an x that does not hold the features of one set of nodes.

    Args:
        x: the features, dense or one of PyTorch's sparse tensors.
        channels: the number of features per node; -1 for any number.

    Raises:
        ValueError: if x is a pair, is not a tensor, has another shape or dtype, or holds NaN or
            infinite numbers.
    """
    expected = f"(num_nodes, {'channels' if channels == -1 else channels})"
    if isinstance(x, tuple | list):
        raise ValueError(
            "x is a pair (x_src, x_dst), the features of two node types (bipartite), as "
            "HeteroConv and to_hetero pass it to a layer between them. An implicit layer feeds the "
            "states of its nodes back to the same nodes: expected one tensor, and an edge type "
            "within one node type. HeteroData.to_homogeneous() makes one graph of all node types"
        )
    if isinstance(x, torch.fx.Proxy):
        raise ValueError(
            "x is a placeholder of torch.fx, by which to_hetero traces models. What an IGNN "
            "computes depends on the graph, so it cannot be traced. Build the model from IGNNConv "
            "layers: tracing does not enter layers"
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
        raise ValueError(
            f"x holds {int((~torch.isfinite(values)).sum())} NaN or infinite numbers; expected "
            "finite numbers"
        )


def check_edges(edges: Edges) -> None:
    """Refuse edges that do not connect nodes of the graph, and weights that are not finite.

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
            f"edge_weight holds {int((~torch.isfinite(weight)).sum())} NaN or infinite numbers; "
            "expected finite numbers"
        )


def check_graph(graph: Graph, edge_weight: Tensor | None, x: Tensor) -> Graph:
    """Check a graph that is passed in place of edges, and return it for one more forward pass.

    Args:
        graph: the graph.
        edge_weight: the weights that were passed beside it; None is expected.
        x: node features, shape (num_nodes, channels).

    Raises:
        ValueError: if there are weights beside the graph, or x has another number of nodes.
    """
    if edge_weight is not None:
        raise ValueError(
            "edge_weight beside a Graph; expected None, since the Graph holds its weights"
        )
    if graph.num_nodes != len(x):
        raise ValueError(
            f"the Graph has {graph.num_nodes} nodes, but x has {len(x)}; expected as many"
        )
    return graph.current()
