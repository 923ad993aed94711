"""One implicit graph layer: the official code against `IGNNConv`, forward and backward.

    python benchmarks/ignn_layer.py --root DIR

On the first 128 graphs of PROTEINS, which PyG finds in or downloads to DIR, with the same weights
and 64 channels. The official code has to be in `.hosts/IGNN`, or in `IGNN` in the folder that
DEQ_PHANTOM_HOSTS names (https://github.com/SwiftieH/IGNN). Prints the median time of a pass of
each, taken in turn, and its ratio to the official layer's.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch_geometric.data import Batch
from torch_geometric.datasets import TUDataset
from torch_geometric.nn.conv.gcn_conv import gcn_norm

from deq_phantom_plugin.adapters.ignn import Graph, IGNNConv, project_rows
from deq_phantom_plugin.diagnostics.cost import now
from deq_phantom_plugin.output import text_table

CHANNELS = 64
GRADS = ["ift", "ift(solver='fixed_point')", "upg", "npg", "jfb"]


def official_layer() -> type[torch.nn.Module]:
    """Return the official `ImplicitGraph`.

    Raises:
        SystemExit: if it is not there.
    """
    hosts = Path(os.environ.get("DEQ_PHANTOM_HOSTS", Path(__file__).parents[1] / ".hosts"))
    folder = hosts / "IGNN" / "graphclassification"
    if not folder.is_dir():
        raise SystemExit(f"no {folder}: put a checkout of SwiftieH/IGNN there")
    sys.path.insert(0, str(folder))
    sys.modules.setdefault("torch_sparse", types.ModuleType("torch_sparse"))  # imported, not used
    layer: type[torch.nn.Module] = importlib.import_module("layers").ImplicitGraph
    return layer


def passes(batch: Batch, grads: list[str]) -> dict[str, Callable[[], Tensor]]:
    """Return the forward pass of each layer; all give the same states."""
    (source, target), weight = gcn_norm(batch.edge_index, None, batch.num_nodes)
    adjacency = torch.sparse_coo_tensor(
        torch.stack([source, target]), weight, (batch.num_nodes,) * 2, check_invariants=True
    )
    official = official_layer()(batch.num_features, CHANNELS, batch.num_nodes, kappa=0.9)
    found = {"official": lambda: official(None, adjacency, batch.x.mT, torch.relu, 1.0).mT}
    with torch.no_grad():
        official.W.copy_(project_rows(official.W, torch.tensor(0.89)))
    graph = Graph(source, target, weight, batch.num_nodes)
    for grad in grads:
        conv = IGNNConv(batch.num_features, CHANNELS, grad=grad, lambda_pf=1.0, bias=False)
        with torch.no_grad():
            conv.weight.copy_(official.W)
            conv.omega.copy_(official.Omega_1)
        found[grad] = lambda conv=conv: conv(batch.x, graph)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--root", required=True, help="folder of PyG's data sets")
    parser.add_argument("--grad", nargs="+", default=GRADS)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
    torch.manual_seed(0)
    dataset = TUDataset(str(Path(args.root).expanduser()), "PROTEINS")
    batch = Batch.from_data_list(list(dataset[:128]))
    layers, device = passes(batch, args.grad), torch.device("cpu")
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in layers}
    for _ in range(args.repeats):
        for name, forward in layers.items():
            start = now(device)
            out = forward()
            middle = now(device)
            out.square().sum().backward()
            seconds[name].append((middle - start, now(device) - middle))
    rows = []
    for name, pairs in seconds.items():
        parts = [statistics.median(column) for column in zip(*pairs, strict=True)]
        total = statistics.median(sum(pair) for pair in pairs)
        first = statistics.median(sum(pair) for pair in seconds["official"])
        rows.append([name, *(f"{1e3 * s:.1f}" for s in (*parts, total)), f"{total / first:.2f}"])
    print(text_table(["layer", "forward ms", "backward ms", "both ms", "ratio"], rows))


if __name__ == "__main__":
    main()
