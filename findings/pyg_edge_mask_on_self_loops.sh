#!/usr/bin/env bash
# torch-geometric 2.8.1 (PyPI), torch 2.13.0: on a graph whose nodes all have self-loops, an edge mask
# for GCNConv (as every explainer sets one) acts on other edges than it is of.
#
# GCNConv moves self-loops to the end of its edges. Masks are brought into that order only where the
# number of edges has changed, which it has not if every node had its loop. Expected: masking an edge
# changes the node that it points at. Seen, on nodes 0 to 3 with their loops and 0-1, 1-2, 2-3:
#
#   loops listed last     each edge changes its target
#   loops listed first    the loop of node 3 changes node 0, that of 0 node 1, that of 1 node 2, ...
#
# Exit status 0 if that is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 torch-geometric==2.8.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from torch_geometric.explain.algorithm.utils import clear_masks, set_masks
from torch_geometric.nn import GCNConv

torch.manual_seed(0)
conv, x = GCNConv(3, 2, bias=False).double(), torch.randn(4, 3).double()
loops, chain = [(i, i) for i in range(4)], [(0, 1), (1, 2), (2, 3)]


@torch.no_grad()
def hits(edges):
    """Return how many edges change their own target when they alone are masked."""
    edge_index, right = torch.tensor(edges).T, 0
    full = conv(x, edge_index)
    for number, edge in enumerate(edges):
        mask = torch.ones(len(edges)).double()
        mask[number] = 0
        set_masks(conv, torch.nn.Parameter(mask), edge_index, apply_sigmoid=False)
        changed = (conv(x, edge_index) - full).abs().sum(1).nonzero().flatten().tolist()
        clear_masks(conv)
        right += changed == [edge[1]]
        print(f"  masked {edge}: changes nodes {changed}")
    return right


print("loops listed last")
last = hits(chain + loops)
print("loops listed first")
first = hits(loops + chain)
sys.exit(0 if (last, first) == (7, 3) else "the behaviour has changed")
PYTHON
