"""`GraphLayer`, the base class that makes an implicit layer a layer of PyTorch Geometric.

It implements what PyG's tools expect of a layer: an input size that is found at the first call, and
masks of edges, which explainers set. It refuses tools that need the messages of single edges.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy

from .graph import Graph

if TYPE_CHECKING:
    MessagePassing = nn.Module
else:
    try:  # PyG's tools find the layers of a model by this class
        from torch_geometric.nn import MessagePassing
    except ImportError:
        MessagePassing = nn.Module

_STEPS = ("propagate", "message", "aggregate", "message_and_aggregate", "edge_update")


class GraphLayer(MessagePassing):
    """A layer on a graph; it is a `MessagePassing` layer if PyG is installed.

    PyG's layers pass messages edge by edge. An implicit layer multiplies by a matrix instead, many
    times. So masks of edges have an effect, and tools that act on single messages are refused.

    Args:
        in_channels: the size of each node's features; -1 takes the size of the first features, or
            of the checkpoint.
        out_channels: the size of each node's state.

    Attributes:
        omega: the parameter that multiplies the features, shape (out_channels, in_channels).

    Raises:
        ValueError: if a size is not a whole number of at least 1.
    """

    omega: nn.Parameter

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        if isinstance(in_channels, tuple | list):
            raise ValueError(
                f"in_channels={in_channels!r} is a pair, for two node types (bipartite); "
                f"{type(self).__name__} has one set of nodes: expected one whole number"
            )
        for name, size in (("in_channels", in_channels), ("out_channels", out_channels)):
            lazy = name == "in_channels" and size == -1
            if isinstance(size, bool) or not isinstance(size, int) or not (size >= 1 or lazy):
                more = ", or -1 for that of the first features" if name == "in_channels" else ""
                raise ValueError(f"{name}={size!r}; expected a whole number of at least 1{more}")
        self.in_channels, self.out_channels = in_channels, out_channels

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "inspector" not in state:  # a pickle of 0.1, when this was not a layer of PyG
            super().__init__()
            state = {**vars(self), **state}
        super().__setstate__(state)

    # --- a size that is not known yet -------------------------------------------------------------

    def make_omega(self) -> nn.Parameter:
        """Return omega without values.

        A subclass registers it where it belongs in the order of parameters, by which optimisers
        number them.
        """
        if self.in_channels == -1:
            return cast(nn.Parameter, UninitializedParameter())  # a Tensor in PyTorch's stubs
        return nn.Parameter(torch.empty(self.out_channels, self.in_channels))

    def reset_omega(self) -> None:
        """Draw omega; if it has no size yet, it is drawn once the first features are there."""
        raise NotImplementedError

    def _fix_in_channels(self, in_channels: int) -> None:
        """Allocate and draw omega, if it has no size yet."""
        if is_lazy(self.omega):
            # The first features may come in inference mode; omega must be trainable later.
            with torch.inference_mode(False):
                self.omega.materialize((self.out_channels, in_channels))  # type: ignore[attr-defined]
                self.in_channels = in_channels
                self.reset_omega()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        lazy = self.omega if is_lazy(self.omega) else None
        if lazy is None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        self._parameters["omega"] = None  # an uninitialised parameter cannot be detached
        try:
            super()._save_to_state_dict(destination, prefix, keep_vars)
        finally:
            self._parameters["omega"] = lazy
        destination[prefix + "omega"] = lazy

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        given = state_dict.get(prefix + "omega")
        if isinstance(given, Tensor) and not is_lazy(given) and given.dim() == 2:
            self._fix_in_channels(given.shape[1])
        super()._load_from_state_dict(state_dict, prefix, *args)

    # --- what PyG's tools set on a layer ----------------------------------------------------------

    @property
    def is_explained(self) -> bool:
        """Whether an explainer has set a mask of edges."""
        return getattr(self, "explain", None) is True

    def masked(self, graph: Graph) -> Graph:
        """Return a graph whose weights are multiplied by the explainer's mask of edges.

        The gradient with respect to the mask is that of the masked weights. Self-loops that a
        normalisation has added are not masked, as in PyG's own layers.

        Args:
            graph: the graph before masking.

        Raises:
            ValueError: if there is no mask, or it does not fit the graph.
        """
        mask: Any = self._edge_mask
        if mask is None:
            raise ValueError(
                "explain=True without an edge mask; expected a mask that `set_masks` of "
                "torch_geometric.explain has set"
            )
        if self._apply_sigmoid:
            mask = mask.sigmoid()
        given = len(mask)
        if graph.has_added_loops:
            mask = torch.cat([mask[self._loop_mask], mask.new_ones(graph.num_nodes)])
        if mask.shape != graph.weight.shape:
            raise ValueError(
                f"the edge mask has {given} entries, which do not fit this graph; expected one for "
                "each edge that the explainer was given"
            )
        weight = graph.weight * mask.to(graph.weight.dtype)
        return Graph(graph.source, graph.target, weight, graph.num_nodes)

    def check_tools(self) -> None:
        """Refuse tools that act on single messages, and the flow from target to source.

        Raises:
            NotImplementedError: if hooks, or a method of an explainer, need single messages.
            ValueError: if `flow` has been changed.
        """
        name = type(self).__name__
        flow = getattr(self, "flow", "source_to_target")
        if flow != "source_to_target":
            raise ValueError(
                f"flow={flow!r}; expected 'source_to_target', the only flow of {name}. Pass "
                "edge_index.flip(0) to reverse the edges"
            )
        attributes = vars(self)
        hooked = any(
            attributes.get(f"_{step}_forward_{kind}")
            for step in _STEPS
            for kind in ("pre_hooks", "hooks")
        )
        if hooked or "explain_message" in attributes:
            raise NotImplementedError(
                f"{name} multiplies by a matrix and has no single messages: hooks on messages "
                "(AttentionExplainer, to_hetero_with_bases) and methods `explain_message` "
                "(GraphMaskExplainer) would have no effect on it. Masks of edges have one: take "
                "GNNExplainer, PGExplainer or CaptumExplainer. With conv.explain = False, "
                "AttentionExplainer leaves the layer out"
            )
