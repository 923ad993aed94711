"""The layer, and models of it."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.calls import Calls, Counted
from deq_phantom_plugin._plumbing.extras import require
from deq_phantom_plugin._plumbing.precision import full_precision
from deq_phantom_plugin.hosts.attaching import Attaching
from deq_phantom_plugin.hosts.evaluation import attaches, watched
from deq_phantom_plugin.hosts.ignn import IGNNHost

from .graph import Edges, Graph, LastGraph, check_edges, check_features, parse_edges
from .layer import GraphLayer

__all__ = ["ACTIVATIONS", "IGNN", "FixedPoint", "Graph", "IGNNConv", "IGNNHost", "project_rows"]

Activation = Callable[[Tensor], Tensor]

# Applied to each number, and non-expansive: what well-posedness needs (paper, section 3).
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

# The same in place, where backward needs only the result: an array less in every evaluation.
_IN_PLACE: Mapping[str, Activation] = MappingProxyType({"relu": torch.relu_, "tanh": torch.tanh_})

_CHECK_EVERY = 4


def project_rows(weight: Tensor, radius: Tensor) -> Tensor:
    """Project each row onto the L1 ball: all of W onto the inf-norm ball ||W||_inf <= radius.

    By sorting, Duchi et al. 2008, "Efficient Projections onto the l1-Ball for Learning in High
    Dimensions", Figure 1; differentiable.

    Args:
        weight: shape (rows, columns).
        radius: of the ball, shape (); infinite for none.
    """
    magnitude = weight.abs()
    ordered = magnitude.sort(dim=1, descending=True).values
    excess = ordered.cumsum(dim=1) - radius
    count = torch.arange(1, weight.shape[1] + 1, device=weight.device)
    kept = (ordered * count > excess).sum(dim=1, keepdim=True).clamp_min(1)
    threshold = excess.gather(1, kept - 1) / kept
    shrunk = weight.sign() * (magnitude - threshold).clamp_min(0)
    return torch.where(magnitude.sum(dim=1, keepdim=True) > radius, shrunk, weight)


class FixedPoint(Attaching):
    """The equilibrium of a map, solved by iteration and attached by a strategy.

    Args:
        grad: the strategy's spec, see `dpp.get_strategy`.
        f_max_iter: the most iterations.
        f_tol: largest change of a number at which to stop, of the largest number where that is
            above 1: float32 has no smaller ones there.
        grad_in_eval: whether the gradient is attached in evaluation mode too.

    Attributes:
        grad: the strategy; `dpp.set_grad` replaces it.
        memory: what the strategy keeps between steps.
    """

    host = "ignn"

    def __init__(
        self, grad: Any, f_max_iter: int, f_tol: float, grad_in_eval: bool = False
    ) -> None:
        # Nodes depend on one another: the state is one sample.
        super().__init__(grad, batch_dim=None, grad_in_eval=grad_in_eval)
        if isinstance(f_max_iter, bool) or not isinstance(f_max_iter, int) or f_max_iter < 1:
            raise ValueError(f"f_max_iter={f_max_iter!r}; expected a whole number of at least 1")
        if not f_tol >= 0:
            raise ValueError(f"f_tol={f_tol!r}; expected a number of at least 0")
        self.f_max_iter, self.f_tol = f_max_iter, f_tol
        self._calls = Calls()

    @property
    def nfe(self) -> int:
        """Evaluations of the map in the last solve."""
        return int(self._calls.of_solve())

    def forward(
        self, func: Callable[[Tensor], Tensor], start: Tensor, explained: bool = False
    ) -> Tensor:
        """Return the equilibrium: attached in training, as it is in evaluation.

        Args:
            func: the map.
            start: where the solve begins.
            explained: whether to attach it in evaluation, too: explainers differentiate there.

        Raises:
            NonFiniteError: if the solve makes a NaN or an infinity.
        """
        context = self.context(start)
        attaching = attaches(self) or (explained and torch.is_grad_enabled())
        counted = Counted(func)
        self._calls = counted.calls
        if not attaching:
            return self._solve(watched(self, counted), start)
        if self.grad.resolve(context).owns_solve:
            return self.attached(counted, start, context, 0)
        return self.attached(func, self._solve(counted, start), context, self.nfe)

    @torch.no_grad()
    def _solve(self, func: Callable[[Tensor], Tensor], state: Tensor) -> Tensor:
        if state.numel() == 0:
            return state
        for step in range(1, self.f_max_iter + 1):
            state, last = func(state), state
            # Looking at the number waits for the device.
            if step % _CHECK_EVERY == 0 or step == self.f_max_iter:
                change = float((state - last).abs().amax() / state.abs().amax().clamp_min(1))
                if change <= self.f_tol:
                    return state
                if not math.isfinite(change):
                    raise dpp.NonFiniteError(
                        f"the forward solve made NaN or infinite states in {step} iterations; look "
                        "for such numbers in the parameters, or for an activation steeper than 1"
                    )
        warnings.warn(
            f"the forward solve stopped at f_max_iter={self.f_max_iter} with a change of "
            f"{change:.1e}, above f_tol={self.f_tol}; raise either, or lower kappa",
            dpp.ConvergenceWarning,
            stacklevel=3,
        )
        return state


class IGNNConv(GraphLayer):
    r"""The implicit graph layer H = phi(A^T H W^T + A^T U Omega^T + bias) (paper, eq. 1 and 2).

    W is projected so that ||W||_inf <= kappa / lambda_pf(|A|), which makes the equilibrium exist,
    unique and reachable by iteration (paper, Theorem 3.1 and section 3). The projection is part of
    the layer and differentiated with it; the parameter itself is the optimiser's alone. Projected
    in place, as the official code does before each forward, it would change under gradients that
    are still to come, differ between workers whose graphs differ, and follow the strictest graph
    ever seen.

    In training mode the result carries the gradient of `grad`; in evaluation mode, as of any
    equilibrium of this package, none, but while an explainer of PyG has set a mask of edges.

    Parameters and features of 16 bits, and autocast, are ways to store what goes in and out: the
    equilibrium is solved, and differentiated, in 32 bits at least.

    Args:
        in_channels: size of each node's features U; -1 for that of the first ones, or of the
            checkpoint.
        out_channels: size of each node's state H.
        kappa: bound of the contraction, in (0, 1).
        grad: the gradient of the equilibrium, a spec of `dpp.get_strategy`; `dpp.set_grad` changes
            it later.
        activation: phi, a name in `ACTIVATIONS`, or a function of each number by itself whose slope
            is at most 1.
        bias: whether to add a bias, which begins at zero; the official code has none.
        lambda_pf: the Perron-Frobenius eigenvalue of |A| where it is known, such as 1 after
            `torch_geometric.nn.conv.gcn_conv.gcn_norm`: a constant, whatever the edge weights are.
            Computed for each new graph if None, and then differentiated with the edge weights
            where they require grad; it has no second derivative in them.
        f_max_iter: the most iterations of the forward solve.
        f_tol: largest change at which the forward solve stops, relative to states above 1.
        grad_in_eval: whether the gradient is attached in evaluation mode too.

    Shapes:
        - **input:** node features (num_nodes, in_channels), edge indices (2, num_edges), edge
          weights (num_edges), optional.
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
        self.equilibrium = FixedPoint(grad, f_max_iter, f_tol, grad_in_eval)
        self._last_graph = LastGraph()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw W and Omega as the official code does; the bias is zero.

        W begins where that code's first forward puts it on a normalised graph, but a little inside.
        Left outside the ball, entries that the projection makes zero would have no gradient; on its
        surface, rounding (to 16 bits, say) would choose a side of the kink for each row.
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
            x: node features, shape (num_nodes, in_channels); dense, or a sparse tensor of PyTorch.
            edge_index: (2, num_edges), as a tensor or `EdgeIndex`; or the matrix A^T, PyG's
                `adj_t`, as a sparse tensor or `torch_sparse.SparseTensor`; or a `Graph`.
            edge_weight: shape (num_edges,); ones if None. It may require grad.
            batch: the graph of each node, shape (num_nodes,). Graphs of a mini-batch share no
                edges, so that nothing depends on it.

        Returns:
            Node states, shape (num_nodes, out_channels).

        Raises:
            ValueError: if x or the weights hold NaN or infinite numbers, an edge ends outside the
                nodes, or shapes do not fit; if x is a pair, of two node types.
            NotImplementedError: if something of PyG waits for single messages.
        """
        check_features(x, self.in_channels)
        self.check_tools()
        self._fix_in_channels(x.shape[1])
        if isinstance(edge_index, Graph):
            graph = _check_graph(edge_index, edge_weight, x)
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
        """Return the map whose equilibrium this layer is, on states (num_nodes, out_channels).

        Args:
            x: node features, shape (num_nodes, in_channels).
            graph: where they are.
        """
        weight, phi = self.projected_weight(graph), self.activation
        phi = phi if callable(phi) else _IN_PLACE.get(phi, ACTIVATIONS[phi])
        with full_precision(x.device):
            injection = graph.propagate(F.linear(_lifted(x), _lifted(self.omega)))
            if self.bias is not None:
                injection = injection + self.bias

        def func(state: Tensor) -> Tensor:
            with full_precision(state.device):
                return phi(graph.propagate(F.linear(state, weight), bias=injection))

        return func

    def projected_weight(self, graph: Graph) -> Tensor:
        """Return W as it enters the layer on a graph, shape (out_channels, out_channels).

        In 32 bits at least: rounded to 16, it might be outside the ball.
        """
        radius: Any
        if self.lambda_pf is not None:
            radius = self.kappa / self.lambda_pf
        else:
            # Of acyclic graphs it is 0; the radius, and its slope, are to stay finite.
            smallest = torch.finfo(graph.weight.dtype).tiny ** 0.5
            radius = self.kappa / graph.lambda_pf.clamp_min(smallest)
        weight = _lifted(self.weight)
        return project_rows(
            weight, torch.as_tensor(radius, dtype=weight.dtype, device=weight.device)
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.in_channels}, {self.out_channels}, kappa={self.kappa}, "
            f"grad={str(self.equilibrium.grad)!r})"
        )


def _lifted(x: Tensor) -> Tensor:
    """Return a tensor in 32 bits, if it has fewer."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_graph(graph: Graph, edge_weight: Tensor | None, x: Tensor) -> Graph:
    if edge_weight is not None:
        raise ValueError("edge_weight beside a Graph; its weights are in it")
    if graph.num_nodes != len(x):
        raise ValueError(f"the Graph has {graph.num_nodes} nodes, but x has {len(x)}")
    return graph.current()


def _check_lambda_pf(lambda_pf: Any) -> float:
    if isinstance(lambda_pf, Tensor) and (lambda_pf.requires_grad or lambda_pf.numel() != 1):
        raise ValueError(
            "lambda_pf is a tensor that requires grad, or holds several numbers; expected one "
            "number, which is constant, or None: then the eigenvalue is computed and differentiated"
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


def _linear(in_channels: int, out_channels: int) -> nn.Linear:
    if in_channels != -1:
        return nn.Linear(in_channels, out_channels)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Lazy modules are a new feature")
        return nn.LazyLinear(out_channels)


def _check_batch(x: Tensor, batch: Tensor | None, batch_size: int | None) -> None:
    if batch is None:
        if batch_size not in (None, 1):
            raise ValueError(f"batch_size={batch_size!r} without batch; expected the graph of each")
        return
    if batch.shape != (len(x),):
        raise ValueError(f"batch has shape {tuple(batch.shape)}; expected ({len(x)},), one a node")
    if len(x) and (batch.min() < 0 or (batch_size is not None and batch.max() >= batch_size)):
        least, most = int(batch.min()), int(batch.max())
        raise ValueError(
            f"batch holds {least} to {most}, with batch_size={batch_size}; expected numbers from 0 "
            "to below batch_size"
        )


class IGNN(nn.Module):
    """The networks of the official code, on `IGNNConv`; raw scores, without softmax.

    - `task="graph"`: the layers one after another, the sum over each graph's nodes, two linear
      layers with dropout between them.
    - `task="node"`, one layer (chains, citation networks): the layer, its states scaled to length
      one, dropout, a linear layer.
    - `task="node"`, several layers (PPI, which has five): each beside a linear skip connection,
      their sum through ELU, but the last.

    Args:
        in_channels: size of each node's features; -1 for that of the first ones.
        hidden_channels: size of the states between layers; one number, or one for each
            (the official code's for PPI are 1024, 512, 512, 256).
        out_channels: scores a graph or node.
        num_layers: implicit layers.
        task: "graph" or "node".
        grad: the gradient of every equilibrium, a spec of `dpp.get_strategy`.
        kappa: bound of the contractions, in (0, 1).
        dropout: probability; where there are skip connections there is none.
        normalize: whether the layers see the symmetrically normalised adjacency with self-loops
            (Kipf & Welling 2017), as the official code has it on all data but PPI.
        **conv_settings: of `IGNNConv`.

    Raises:
        ValueError: if an argument is out of range.
        ImportError: without PyTorch Geometric, whose pooling and normalisation they use.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int | Sequence[int],
        out_channels: int,
        num_layers: int = 3,
        task: str = "graph",
        grad: Any = "upg",
        *,
        kappa: float = 0.9,
        dropout: float = 0.5,
        normalize: bool = True,
        **conv_settings: Any,
    ) -> None:
        super().__init__()
        if task not in ("graph", "node"):
            raise ValueError(f"task={task!r}; expected 'graph' or 'node'")
        if num_layers < 1:
            raise ValueError(f"num_layers={num_layers!r}; expected a whole number of at least 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout!r}; expected a probability in [0, 1)")
        if normalize or task == "graph":
            require("torch_geometric", "graph")
        self.task, self.dropout, self.normalize = task, dropout, normalize
        self.has_skips = task == "node" and num_layers > 1
        n_hidden = num_layers - 1 if self.has_skips else num_layers
        widths = (
            [hidden_channels] * n_hidden if isinstance(hidden_channels, int) else hidden_channels
        )
        if len(widths) != n_hidden:
            raise ValueError(
                f"hidden_channels={hidden_channels}; expected one number, or {n_hidden} for "
                f"{num_layers} layers"
            )
        sizes = [in_channels, *widths, *([out_channels] if self.has_skips else [])]
        # A normalised adjacency is similar to a stochastic matrix.
        known = {"lambda_pf": 1.0} if normalize else {}
        settings = {"bias": False, **known, **conv_settings}
        self.convs = nn.ModuleList(
            IGNNConv(a, b, kappa, grad, **settings) for a, b in itertools.pairwise(sizes)
        )
        self.skips = nn.ModuleList(
            _linear(a, b) for a, b in itertools.pairwise(sizes) if self.has_skips
        )
        self.hidden = nn.Linear(sizes[-1], sizes[-1]) if task == "graph" else None
        self.out = None if self.has_skips else nn.Linear(sizes[-1], out_channels, task == "graph")
        self._last_graph = LastGraph()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        for module in [*self.convs, *self.skips, self.hidden, self.out]:
            if module is not None:
                module.reset_parameters()

    def forward(
        self,
        x: Tensor,
        edge_index: Any,
        edge_weight: Tensor | None = None,
        batch: Tensor | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """Return scores.

        Args:
            x: see `IGNNConv.forward`.
            edge_index: see `IGNNConv.forward`; a `Graph` is one of `prepare`.
            edge_weight: shape (num_edges,); ones if None. It may require grad.
            batch: the graph of each node, shape (num_nodes,); one graph if None.
            batch_size: how many graphs there are, PyG's `batch.num_graphs`. Without it the last one
                is that of the last node: graphs without nodes behind it have no scores.

        Returns:
            Shape (num_graphs, out_channels) or (num_nodes, out_channels).

        Raises:
            ValueError: see `IGNNConv.forward`; or if `batch` and `batch_size` do not fit.
        """
        check_features(x, self.convs[0].in_channels)
        _check_batch(x, batch, batch_size)
        if isinstance(edge_index, Graph):
            graph = _check_graph(edge_index, edge_weight, x)
        else:
            edges = parse_edges(edge_index, edge_weight, x)
            graph = self._last_graph.get(edges, self._as_seen)
            if edges.weight.requires_grad:
                graph = graph.with_weight(self._normalized(edges).weight)
        if self.has_skips:
            if isinstance(self.skips[0], nn.LazyLinear):
                with torch.inference_mode(False):  # which makes ordinary parameters
                    self.skips[0].initialize_parameters(x)
            for conv, skip in zip(self.convs, self.skips, strict=True):
                x = F.elu(x) if conv is not self.convs[0] else x
                x = conv(x, graph) + skip(x)
            return x
        for conv in self.convs:
            x = conv(x, graph)
        # In 16 bits the smallest length is zero, and a sum over many nodes stands still.
        full, dtype = _lifted(x), x.dtype
        if self.hidden is None:
            x = F.normalize(full, dim=-1).to(dtype)
        else:
            from torch_geometric.nn import global_add_pool

            x = F.relu(self.hidden(global_add_pool(full, batch, batch_size).to(dtype)))
        assert self.out is not None
        scores: Tensor = self.out(F.dropout(x, self.dropout, self.training))
        return scores

    def prepare(self, x: Tensor, edge_index: Any, edge_weight: Tensor | None = None) -> Graph:
        """Return a graph as the layers see it, to be passed in place of `edge_index`.

        For mini-batches that come again in every epoch; the last graph is kept anyway. Weights are
        as they are now, also where they require grad: once they are trained, the graph is refused.
        """
        check_features(x, self.convs[0].in_channels)
        graph = self._as_seen(parse_edges(edge_index, edge_weight, x))
        if graph.weight.requires_grad:
            nodes = x.new_empty(len(x), 0)
            graph.renew = functools.partial(self._weight_as_seen, nodes, edge_index, edge_weight)
        return graph

    def _weight_as_seen(self, x: Tensor, edge_index: Any, edge_weight: Tensor | None) -> Tensor:
        return self._normalized(parse_edges(edge_index, edge_weight, x)).weight

    def _as_seen(self, edges: Edges) -> Graph:
        check_edges(edges)  # gcn_norm would fail with an error of its own
        graph = Graph(*self._normalized(edges))
        graph.has_added_loops = self.normalize
        return graph

    def _normalized(self, edges: Edges) -> Edges:
        if not self.normalize:
            return edges
        from torch_geometric.nn.conv.gcn_conv import gcn_norm

        source, target, weight, num_nodes = edges
        if (weight < 0).any():
            raise ValueError(
                f"edge_weight holds {int((weight < 0).sum())} negative numbers; normalize=True "
                "takes none, as degrees are sums of weights"
            )
        # Of parallel self-loops gcn_norm keeps one, and gives the others its gradient.
        loop = source == target
        nodes, place = source[loop].unique(return_inverse=True)
        loops = weight.new_zeros(len(nodes)).index_add(0, place, weight[loop])
        source, target = torch.cat([source[~loop], nodes]), torch.cat([target[~loop], nodes])
        weight = torch.cat([weight[~loop], loops])
        (source, target), weight = gcn_norm(
            torch.stack([source, target]), weight, num_nodes, dtype=weight.dtype
        )
        return Edges(source, target, weight, num_nodes)
