"""Implicit graph neural networks (IGNN) as PyTorch Geometric layers, with a gradient by name.

Source: Gu et al., "Implicit Graph Neural Networks", NeurIPS 2020, arXiv:2009.06211. The states of
all nodes are the equilibrium X = phi(W X A + b(U)) of one layer. So each state depends on all nodes
from which a path leads to it.

    conv = IGNNConv(16, 32, grad="upg(k=5, lam=0.8)")
    h = conv(x, edge_index, edge_weight)

The paper's matrices have the shape (features, nodes). Here they have (nodes, features), as in PyG:

    H = phi(A^T H W^T + b),    b = A^T U Omega^T + bias.

A[i, j] is the weight of the edge from node i = edge_index[0] to node j = edge_index[1].
"""

from deq_phantom_plugin.hosts.ignn import IGNNHost

from .conv import ACTIVATIONS, IGNNConv
from .fixed_point import FixedPoint
from .graph import Graph
from .model import IGNN
from .projection import project_rows

__all__ = ["ACTIVATIONS", "IGNN", "FixedPoint", "Graph", "IGNNConv", "IGNNHost", "project_rows"]
