import torch
from models_chains import IGNN
from settings import deq_args
from torch.nn import functional as F


def build():
    nodes, features = 30, 5
    model = IGNN(deq_args("--f_max_iter", "50"), features, 8, 2, nodes, dropout=0.0, kappa=0.9)
    dense = (torch.rand(nodes, nodes) < 0.15).to(torch.get_default_dtype()).fill_diagonal_(1)
    dense = ((dense + dense.T) > 0).to(dense.dtype)
    degree = dense.sum(1).rsqrt()
    adjacency = (degree[:, None] * dense * degree).to_sparse().coalesce()
    x, labels = torch.randn(features, nodes), torch.randint(2, (nodes,))
    return model, lambda: F.cross_entropy(model(x, adjacency), labels)
