import torch
from models import IGNN
from torch.nn import functional as F


def build():
    nodes, features = 30, 5
    model = IGNN(features, 8, 2, None, dropout=0.0, kappa=0.9)
    block = torch.arange(nodes) // 10
    dense = ((torch.rand(nodes, nodes) < 0.4) & (block[:, None] == block)).fill_diagonal_(True)
    dense = (dense | dense.T).to(torch.get_default_dtype())
    degree = dense.sum(1).rsqrt()
    adjacency = (degree[:, None] * dense * degree).to_sparse().coalesce()
    x, labels = torch.randn(features, nodes), torch.randint(2, (3,))
    return model, lambda: F.nll_loss(model(x, adjacency, block), labels)
