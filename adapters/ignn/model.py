"""The networks of the official code."""

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
                with torch.inference_mode(False):  # which makes ordinary parameters
                    self.skips[0].initialize_parameters(x)
            for conv, skip in zip(self.convs, self.skips, strict=True):
                x = F.elu(x) if conv is not self.convs[0] else x
                x = conv(x, graph) + skip(x)
            return x
        for conv in self.convs:
            x = conv(x, graph)
        # In 16 bits the smallest length is zero, and a sum over many nodes stands still.
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

        For mini-batches that come again in every epoch; the last graph is kept anyway. Weights are
        as they are now, also where they require grad: once they are trained, the graph is refused.
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
        raise ValueError(f"batch has shape {tuple(batch.shape)}; expected ({len(x)},)")
    if len(x) and (batch.min() < 0 or (batch_size is not None and batch.max() >= batch_size)):
        least, most = int(batch.min()), int(batch.max())
        raise ValueError(
            f"batch holds {least} to {most}, with batch_size={batch_size}; expected numbers from 0 "
            "to below batch_size"
        )
