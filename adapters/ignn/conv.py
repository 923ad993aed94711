"""`IGNNConv`, the implicit graph layer.

The layer projects its weight W, builds the map F(H) = phi(A^T H W^T + A^T U Omega^T + bias) for a
graph, and hands F to `FixedPoint`, which solves H = F(H) and attaches the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from deq_phantom_plugin._plumbing.precision import full_precision

from .fixed_point import FixedPoint
from .graph import Graph, LastGraph, check_features, check_graph, parse_edges
from .layer import GraphLayer
from .projection import project_rows

Activation = Callable[[Tensor], Tensor]

# The activations act on each number by itself and are non-expansive. Well-posedness needs both
# (paper, section 3).
ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "elu": F.elu,
        "identity": lambda x: x,
        "leaky_relu": F.leaky_relu,
        "relu": torch.relu,
        "sigmoid": torch.sigmoid,
        "softplus": F.softplus,
        "tanh": torch.tanh,
    }
)

# In-place versions of the activations whose backward pass needs only their result. They save one
# array in every evaluation of F.
_IN_PLACE: Mapping[str, Activation] = MappingProxyType({"relu": torch.relu_, "tanh": torch.tanh_})


class IGNNConv(GraphLayer):
    r"""The implicit graph layer H = phi(A^T H W^T + A^T U Omega^T + bias) (paper, eq. 1 and 2).

    W is projected so that ||W||_inf <= kappa / lambda_pf(|A|). Then the equilibrium exists, is
    unique, and is found by iteration (paper, Theorem 3.1 and section 3). The projection is a part
    of the layer and is differentiated with it; only the optimiser changes the parameter itself. The
    official code projects the parameter in place before each forward pass. In place, it would
    change before pending backward passes, differ between workers whose graphs differ, and keep the
    bound of the strictest graph so far.

    In training mode the result carries the gradient of `grad`. In evaluation mode it carries none,
    as with every equilibrium of this package, unless an explainer of PyG has set a mask of edges.

    Parameters and features may have 16 bits, and autocast may be on. The equilibrium is solved and
    differentiated in at least 32 bits all the same.

    Args:
        in_channels: the size of each node's features U; -1 takes the size of the first features, or
            of the checkpoint.
        out_channels: the size of each node's state H.
        kappa: the bound of the contraction, in (0, 1).
        grad: the gradient of the equilibrium, a spec of `dpp.get_strategy`; `dpp.set_grad` changes
            it later.
        activation: phi: a name in `ACTIVATIONS`, or a function that acts on each number by itself
            with a slope of at most 1.
        bias: whether to add a bias, which begins at zero; the official code has none.
        lambda_pf: the Perron-Frobenius eigenvalue of |A| if it is known, such as 1 after
            `torch_geometric.nn.conv.gcn_conv.gcn_norm`. It is then a constant, whatever the edge
            weights are. If it is None, it is computed for each new graph, and differentiated with
            respect to edge weights that require grad. It has no second derivative in them.
        f_max_iter: the largest number of iterations of the forward solve.
        f_tol: the solve stops once no number of the state changes by more than this. The change is
            relative to the largest number of the state if that is above 1.
        grad_in_eval: whether the gradient is attached in evaluation mode too.
        compile: whether F is compiled for the solve, and for gradients that go through its graph
            once; or a mode of `torch.compile`, see docs/howto/compile.md.

    Shapes:
        - **input:** node features (num_nodes, in_channels), edge indices (2, num_edges), and
          optionally edge weights (num_edges,).
        - **output:** node states (num_nodes, out_channels).

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kappa: float = 0.9,
        grad: Any = "upg",
        activation: str | Activation = "relu",
        *,
        bias: bool = True,
        lambda_pf: float | None = None,
        f_max_iter: int = 300,
        f_tol: float = 3e-6,
        grad_in_eval: bool = False,
        compile: bool | str = False,
    ) -> None:
        super().__init__(in_channels, out_channels)
        if not 0 < kappa < 1:
            raise ValueError(f"kappa={kappa!r}; expected a number above 0 and below 1")
        if lambda_pf is not None:
            lambda_pf = _check_lambda_pf(lambda_pf)
        self.kappa, self.lambda_pf = kappa, lambda_pf
        self.activation = _check_activation(activation)
        self.weight = nn.Parameter(torch.empty(out_channels, out_channels))
        self.omega = self.make_omega()
        self.bias: nn.Parameter | None
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels)) if bias else None)
        self.equilibrium = FixedPoint(grad, f_max_iter, f_tol, grad_in_eval, compile)
        self._last_graph = LastGraph()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw W and Omega as the official code does, and set the bias to zero.

        W begins a little inside the ball of radius kappa, onto which that code's first forward pass
        projects it on a normalised graph. Outside the ball, the entries that the projection sets to
        zero would have no gradient. On its surface, rounding to 16 bits would decide for each row
        whether the projection acts.
        """
        limit = self.out_channels**-0.5
        nn.init.uniform_(self.weight, -limit, limit)
        self.reset_omega()
        with torch.no_grad():
            self.weight.copy_(project_rows(self.weight, torch.tensor(self.kappa)) * (1 - 2**-8))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def reset_omega(self) -> None:
        """See `GraphLayer`."""
        if not is_lazy(self.omega):
            limit = self.out_channels**-0.5
            nn.init.uniform_(self.omega, -limit, limit)

    def forward(
        self,
        x: Tensor,
        edge_index: Any,
        edge_weight: Tensor | None = None,
        batch: Tensor | None = None,
    ) -> Tensor:
        """Return the equilibrium.

        Args:
            x: node features, shape (num_nodes, in_channels), dense or a sparse tensor of PyTorch.
            edge_index: shape (2, num_edges), as a tensor or `EdgeIndex`; or the matrix A^T, PyG's
                `adj_t`, as a sparse tensor or `torch_sparse.SparseTensor`; or a `Graph`.
            edge_weight: shape (num_edges,); ones if None. It may require grad.
            batch: the graph of each node, shape (num_nodes,). It has no effect: graphs of a
                mini-batch share no edges.

        Returns:
            Node states, shape (num_nodes, out_channels).

        Raises:
            ValueError: if x or the weights hold NaN or infinite numbers, if an edge ends outside
                the nodes, if shapes do not fit, or if x is a pair of two node types.
            NotImplementedError: if a tool of PyG needs the messages of single edges.
        """
        check_features(x, self.in_channels)
        self.check_tools()
        self._fix_in_channels(x.shape[1])
        if isinstance(edge_index, Graph):
            graph = check_graph(edge_index, edge_weight, x)
        else:
            edges = parse_edges(edge_index, edge_weight, x)
            graph = self._last_graph.get(edges, lambda new: Graph(*new))
            if edges.weight.requires_grad:
                graph = graph.with_weight(edges.weight)
        if self.is_explained:
            graph = self.masked(graph)
        func = self.equilibrium_func(x, graph)
        start = graph.weight.new_zeros(len(x), self.out_channels)
        out: Tensor = self.equilibrium(func, start, explained=self.is_explained)
        return out.to(x.dtype)

    def equilibrium_func(self, x: Tensor, graph: Graph) -> Callable[[Tensor], Tensor]:
        """Return F, the map whose equilibrium this layer returns.

        F takes and returns states of shape (num_nodes, out_channels).

        Args:
            x: node features, shape (num_nodes, in_channels).
            graph: the graph of the nodes.
        """
        weight, phi = self.projected_weight(graph), self.activation
        phi = phi if callable(phi) else _IN_PLACE.get(phi, ACTIVATIONS[phi])
        with full_precision(x.device):
            injection = graph.propagate(F.linear(lifted(x), lifted(self.omega)))
            if self.bias is not None:
                injection = injection + self.bias

        def func(state: Tensor) -> Tensor:
            with full_precision(state.device):
                return phi(graph.propagate(F.linear(state, weight), bias=injection))

        return func

    def projected_weight(self, graph: Graph) -> Tensor:
        """Return the projection of W for a graph, shape (out_channels, out_channels).

        It has at least 32 bits: rounding to 16 bits could move it outside the ball.
        """
        radius: Any
        if self.lambda_pf is not None:
            radius = self.kappa / self.lambda_pf
        else:
            # The eigenvalue of an acyclic graph is 0; the radius and its slope must stay finite.
            smallest = torch.finfo(graph.weight.dtype).tiny ** 0.5
            radius = self.kappa / graph.lambda_pf.clamp_min(smallest)
        weight = lifted(self.weight)
        return project_rows(
            weight, torch.as_tensor(radius, dtype=weight.dtype, device=weight.device)
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.in_channels}, {self.out_channels}, kappa={self.kappa}, "
            f"grad={str(self.equilibrium.grad)!r})"
        )


def lifted(x: Tensor) -> Tensor:
    """Return a tensor with at least 32 bits per number."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_lambda_pf(lambda_pf: Any) -> float:
    if isinstance(lambda_pf, Tensor) and (lambda_pf.requires_grad or lambda_pf.numel() != 1):
        raise ValueError(
            "lambda_pf is a tensor that requires grad, or holds several numbers; expected one "
            "number, which is a constant, or None. With None the eigenvalue is computed and "
            "differentiated"
        )
    if not lambda_pf > 0:
        raise ValueError(f"lambda_pf={lambda_pf!r}; expected a number above 0, or None")
    return float(lambda_pf)


def _check_activation(activation: str | Activation) -> str | Activation:
    if not callable(activation) and activation not in ACTIVATIONS:
        raise ValueError(
            f"activation={activation!r}; expected one of {', '.join(ACTIVATIONS)}, or a function"
        )
    return activation
