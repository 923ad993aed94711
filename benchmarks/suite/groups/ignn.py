"""Compares one implicit graph layer of the official code with `IGNNConv`, forward and backward.

The data are the first 128 graphs of PROTEINS. Both layers have the same weights and 64 channels.
The official code (https://github.com/SwiftieH/IGNN) must be in `.hosts/IGNN`, or in `IGNN` in the
folder that DEQ_PHANTOM_HOSTS names. The graphs are in the folder of `--graphs`. PyG reads them
there, or downloads them to it. PROTEINS.zip with their text files in this folder is read, too.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..contest import Contender, Contest, Ratio, Settings, Unavailable
from ..peers import checkout
from ..timing import Run

CHANNELS, N_GRAPHS = 64, 128
GRADS = ("ift", "ift(solver='fixed_point')", "upg", "npg", "jfb")


def contests(settings: Settings) -> Iterator[Contest]:
    """Yield the contest."""
    try:
        from torch_geometric.nn.conv.gcn_conv import gcn_norm
    except ImportError:
        raise Unavailable("PyTorch Geometric is not installed") from None
    batch, name = _graphs(settings)
    edges, weight = gcn_norm(batch.edge_index, None, batch.num_nodes)
    setting = _Setting(batch, edges, weight, settings)
    contenders = [
        Contender("ImplicitGraph", "SwiftieH/IGNN", lambda: _pass(setting.official(), setting))
    ]
    for grad in GRADS:
        contenders.append(Contender(grad, "ours", lambda g=grad: _pass(setting.ours(g), setting)))
    ratios = [Ratio(grad, "ImplicitGraph", 0.30) for grad in GRADS]
    yield Contest("ignn", f"{name}, {CHANNELS} channels", contenders, ratios, known=setting.known)


class _Setting:
    """Builds the layers with the same weights, on the same graphs."""

    def __init__(self, batch: Any, edges: Tensor, weight: Tensor, settings: Settings) -> None:
        from deq_phantom_plugin.adapters.ignn import Graph, project_rows

        self.x = batch.x.to(settings.device, settings.dtype)
        self.nodes = batch.num_nodes
        self.edges, self.edge_weight = edges.to(settings.device), weight.to(self.x)
        self.graph = Graph(*self.edges, self.edge_weight, self.nodes)
        torch.manual_seed(0)
        # The official layer draws them uniformly between -1 and 1 over sqrt(channels).
        width = CHANNELS**-0.5
        raw, omega = (
            torch.empty(CHANNELS, columns).uniform_(-width, width).to(self.x)
            for columns in (CHANNELS, self.x.shape[1])
        )
        self.weight, self.omega = project_rows(raw, torch.tensor(0.89).to(raw)), omega
        self.known = [self.x, self.edges, self.edge_weight]

    def ours(self, grad: str) -> Callable[[], Tensor]:
        from deq_phantom_plugin.adapters.ignn import IGNNConv

        conv = IGNNConv(self.x.shape[1], CHANNELS, grad=grad, lambda_pf=1.0, bias=False)
        conv.to(self.x)
        with torch.no_grad():
            conv.weight.copy_(self.weight)
            conv.omega.copy_(self.omega)
        self.known += list(conv.parameters())
        return lambda: conv(self.x, self.graph)

    def official(self) -> Callable[[], Tensor]:
        layer = _official_layer()(self.x.shape[1], CHANNELS, self.nodes, kappa=0.9).to(self.x)
        with torch.no_grad():
            layer.W.copy_(self.weight)
            layer.Omega_1.copy_(self.omega)
        self.known += list(layer.parameters())
        adjacency = torch.sparse_coo_tensor(
            self.edges, self.edge_weight, (self.nodes,) * 2, check_invariants=True
        )
        return lambda: layer(None, adjacency, self.x.mT, torch.relu, 1.0).mT


def _pass(layer: Callable[[], Tensor], setting: _Setting) -> Run:
    """Return a forward and a backward pass through a layer."""

    def run() -> None:
        for tensor in setting.known:
            tensor.grad = None
        layer().square().sum().backward()

    return run


def _official_layer() -> Any:
    folder = checkout("SwiftieH/IGNN", "graphclassification")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    sys.modules.setdefault("torch_sparse", types.ModuleType("torch_sparse"))  # imported, not used
    return importlib.import_module("layers").ImplicitGraph


def _graphs(settings: Settings) -> tuple[Any, str]:
    from torch_geometric.data import Batch, Data

    if settings.graphs is None:
        # Chains with random features, so that the suite can be tried without data.
        length = 8 if settings.quick else 39
        path = torch.arange(length - 1)
        pairs = torch.stack([path, path + 1])
        edges = torch.cat([pairs, pairs.flip(0)], dim=1)
        number = 2 if settings.quick else N_GRAPHS
        data = [Data(x=torch.randn(length, 3), edge_index=edges) for _ in range(number)]
        return Batch.from_data_list(data), f"{number} chains of {length} nodes (no --graphs)"
    from torch_geometric.datasets import TUDataset

    root = settings.graphs.expanduser()
    with tempfile.TemporaryDirectory() as scratch:
        if (root / "PROTEINS.zip").is_file():
            with zipfile.ZipFile(root / "PROTEINS.zip") as archive:
                for member in archive.namelist():
                    if member.endswith(".txt"):
                        target = Path(scratch) / "PROTEINS" / "raw" / Path(member).name
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(archive.read(member))
            root = Path(scratch)
        data = list(TUDataset(str(root), "PROTEINS")[: 2 if settings.quick else N_GRAPHS])
    return Batch.from_data_list(data), f"{len(data)} graphs of PROTEINS"
