"""`IGNN`, the networks of the official code, built from `IGNNConv` layers.

The official code is github.com/SwiftieH/IGNN. One class covers its networks for graphs and for
nodes. It also normalises the adjacency matrix, and keeps the last graph so that its edges are
sorted once.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deq_phantom_plugin._plumbing.extras import require

from .conv import IGNNConv, lifted
from .graph import Edges, Graph, LastGraph, check_edges, check_features, check_graph, parse_edges

_NODE_TOL = 1e-3  # where scores depend on the direction of a state, however small the state is


class IGNN(nn.Module):
    """A network of implicit graph layers, as in the official code; returns scores, not softmax.

    - `task="graph"`: the layers one after another, the sum over the nodes of each graph, and two
      linear layers with dropout between them.
    - `task="node"` with one layer (chains, citation networks): the layer, its states scaled to
      length one, dropout, and a linear layer.
    - `task="node"` with several layers (PPI, which has five): each layer is added to a linear skip
      connection. The sum goes through ELU, except the last one.

    Args:
        in_channels: the size of each node's features; -1 takes the size of the first features.
        hidden_channels: the size of the states between layers: one number for all, or one number
            per layer (the official code has 1024, 512, 512, 256 for PPI).
        out_channels: the number of scores per graph or node.
        num_layers: the number of implicit layers.
        task: "graph" or "node".
        grad: the gradient of every equilibrium, a spec of `dpp.get_strategy`.
        kappa: the bound of the contractions, in (0, 1).
        dropout: the probability of dropout. A network with skip connections has no dropout.
        normalize: whether the layers get the symmetrically normalised adjacency matrix with
            self-loops (Kipf & Welling 2017), as in the official code for all data except PPI.
        **conv_settings: further arguments of `IGNNConv`.

    Raises:
        ValueError: if an argument is out of range.
        ImportError: if PyTorch Geometric is not installed, and its pooling or normalisation is
            needed.
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
                f"hidden_channels={hidden_channels}; expected one number, or {n_hidden} numbers "
                f"for {num_layers} layers"
            )
        sizes = [in_channels, *widths, *([out_channels] if self.has_skips else [])]
        # The normalised adjacency matrix is similar to a stochastic matrix, whose leading
        # eigenvalue is 1.
        known = {"lambda_pf": 1.0} if normalize else {}
        settings = {"bias": False, **known, **conv_settings}
        self.convs = nn.ModuleList(
            IGNNConv(a, b, kappa, grad, **settings) for a, b in itertools.pairwise(sizes)
        )
        if task == "node" and not self.has_skips:
            # The scores are of states that are divided by their lengths, so small states count too.
            last: Any = self.convs[-1]
            last.equilibrium.node_tol = _NODE_TOL
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
            edge_index: see `IGNNConv.forward`. A `Graph` must come from `prepare`.
            edge_weight: shape (num_edges,); ones if None. It may require grad.
            batch: the graph of each node, shape (num_nodes,); one graph if None.
            batch_size: the number of graphs, PyG's `batch.num_graphs`. Without it the graph of the
                last node is taken for the last graph, so later graphs without nodes get no scores.

        Returns:
            Scores, shape (num_graphs, out_channels) or (num_nodes, out_channels).

        Raises:
            ValueError: see `IGNNConv.forward`; also if `batch` and `batch_size` do not fit.
        """
        self._check_features(x)
        _check_batch(x, batch, batch_size)
        if isinstance(edge_index, Graph):
            graph = check_graph(edge_index, edge_weight, x)
        else:
            edges = parse_edges(edge_index, edge_weight, x)
            graph = self._last_graph.get(edges, self._as_seen)
            if edges.weight.requires_grad:
                graph = graph.with_weight(self._normalized(edges).weight)
        if self.has_skips:
            if isinstance(self.skips[0], nn.LazyLinear):
                with torch.inference_mode(False):  # the parameters must be trainable later
                    self.skips[0].initialize_parameters(x)
            for conv, skip in zip(self.convs, self.skips, strict=True):
                x = F.elu(x) if conv is not self.convs[0] else x
                x = conv(x, graph) + skip(x)
            return x
        for conv in self.convs:
            x = conv(x, graph)
        # In 16 bits the smallest length would be zero, and a long sum would stop growing.
        full, dtype = lifted(x), x.dtype
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

        Use it for mini-batches that come again in every epoch; the last graph is kept anyway. The
        graph holds the present weights. Once weights that require grad have changed, it is refused.

        Args:
            x: see `forward`.
            edge_index: see `forward`.
            edge_weight: see `forward`.
        """
        self._check_features(x)
        graph = self._as_seen(parse_edges(edge_index, edge_weight, x))
        if graph.weight.requires_grad:
            nodes = x.new_empty(len(x), 0)
            graph.renew = functools.partial(self._weight_as_seen, nodes, edge_index, edge_weight)
        return graph

    def _check_features(self, x: Tensor) -> None:
        first: Any = self.convs[0]
        check_features(x, first.in_channels)

    def _weight_as_seen(self, x: Tensor, edge_index: Any, edge_weight: Tensor | None) -> Tensor:
        return self._normalized(parse_edges(edge_index, edge_weight, x)).weight

    def _as_seen(self, edges: Edges) -> Graph:
        check_edges(edges)  # gcn_norm would fail with a message that does not name the cause
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
                "expects numbers of at least 0, since it divides by roots of sums of weights"
            )
        # gcn_norm keeps one of several self-loops of a node, and gives its gradient to the others.
        # So they are added up first.
        loop = source == target
        nodes, place = source[loop].unique(return_inverse=True)
        loops = weight.new_zeros(len(nodes)).index_add(0, place, weight[loop])
        source, target = torch.cat([source[~loop], nodes]), torch.cat([target[~loop], nodes])
        weight = torch.cat([weight[~loop], loops])
        (source, target), weight = gcn_norm(
            torch.stack([source, target]), weight, num_nodes, dtype=weight.dtype
        )
        return Edges(source, target, weight, num_nodes)


def _linear(in_channels: int, out_channels: int) -> nn.Linear:
    if in_channels != -1:
        return nn.Linear(in_channels, out_channels)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Lazy modules are a new feature")
        return nn.LazyLinear(out_channels)


def _check_batch(x: Tensor, batch: Tensor | None, batch_size: int | None) -> None:
    if batch is None:
        if batch_size not in (None, 1):
            raise ValueError(
                f"batch_size={batch_size!r} without batch; expected batch, the graph of each node"
            )
        return
    if batch.shape != (len(x),):
        raise ValueError(
            f"batch has shape {tuple(batch.shape)}; expected ({len(x)},), one number per node"
        )
    if len(x) and (batch.min() < 0 or (batch_size is not None and batch.max() >= batch_size)):
        least, most = int(batch.min()), int(batch.max())
        raise ValueError(
            f"batch holds {least} to {most}, with batch_size={batch_size}; expected numbers from 0 "
            "to below batch_size"
        )
