"""Implicit graph neural networks (IGNN) as PyTorch Geometric layers, the gradient chosen by name.

Gu et al., "Implicit Graph Neural Networks", NeurIPS 2020, arXiv:2009.06211. The state of all nodes
is the equilibrium X = phi(W X A + b(U)) of one layer, so that it has seen the whole graph.

    conv = IGNNConv(16, 32, grad="upg(k=5, lam=0.8)")
    h = conv(x, edge_index, edge_weight)

The paper's matrices are features x nodes; here they are nodes x features, as everywhere in PyG:

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
