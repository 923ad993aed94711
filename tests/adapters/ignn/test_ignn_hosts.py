"""Our IGNN against the official layer and networks.

On graphs drawn at random, and on PROTEINS where `DEQ_PHANTOM_DATA` names a folder that has it as
PyG's TUDataset does: `PROTEINS/raw/PROTEINS_A.txt` and so on.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from conftest import HOSTS

pytest.importorskip("torch_geometric")
pytest.importorskip("sklearn")
pytest.importorskip("networkx", reason="the official code imports networkx")

from torch_geometric.data import Batch, Data
from torch_geometric.datasets import TUDataset
from torch_geometric.nn.conv.gcn_conv import gcn_norm
from torch_geometric.utils import remove_self_loops, to_undirected

from deq_phantom_plugin.adapters.ignn import IGNN, Graph, IGNNConv, project_rows

pytestmark = pytest.mark.hosts

MODULES = ("functions", "layers", "models", "models_PPI", "normalization", "utils")


@pytest.fixture(params=["graphclassification", "nodeclassification"])
def official(request, monkeypatch):
    """The official folder's modules, which import one another by their bare names."""
    folder = HOSTS / "IGNN" / request.param
    if not folder.is_dir():
        pytest.skip(f"no {folder}: put a checkout there, or set DEQ_PHANTOM_HOSTS")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setitem(sys.modules, "torch_sparse", types.ModuleType("torch_sparse"))  # unused
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in MODULES:
        sys.modules.pop(name, None)


def generated():
    """Graphs of PROTEINS' size: undirected, one-hot features."""
    graphs = []
    for num_nodes in torch.randint(10, 60, (32,)).tolist():
        edges = remove_self_loops(torch.randint(num_nodes, (2, 2 * num_nodes)))[0]
        x = F.one_hot(torch.randint(3, (num_nodes,)), 3).float()
        graphs.append(Data(x=x, edge_index=to_undirected(edges, num_nodes=num_nodes)))
    return Batch.from_data_list(graphs)


def proteins():
    root = os.environ.get("DEQ_PHANTOM_DATA")
    if root is None or not (Path(root) / "PROTEINS/raw/PROTEINS_A.txt").is_file():
        pytest.skip("no PROTEINS: set DEQ_PHANTOM_DATA to a folder with PROTEINS/raw/*.txt")
    return Batch.from_data_list(TUDataset(root, "PROTEINS")[:128])


@pytest.fixture(params=[generated, proteins])
def batch(request):
    return request.param()


def normalised(batch):
    (source, target), weight = gcn_norm(batch.edge_index, None, batch.num_nodes)
    return source, target, weight


def official_adjacency(source, target, weight, num_nodes):
    return torch.sparse_coo_tensor(torch.stack([source, target]), weight, (num_nodes, num_nodes))


def assert_close(found, expected, tolerance=1e-5):
    assert (found - expected).norm() < tolerance * expected.norm()


def test_projection(official):
    weight = torch.randn(64, 64, dtype=torch.float64)
    expected = official("utils").projection_norm_inf(torch.nn.Parameter(weight.clone()), 0.9)
    torch.testing.assert_close(project_rows(weight, torch.tensor(0.9).double()), expected.data)


def test_normalisation(official, batch):
    scipy_sparse = pytest.importorskip("scipy.sparse")
    n = batch.num_nodes
    edges = scipy_sparse.coo_matrix((torch.ones(batch.num_edges), batch.edge_index), (n, n))
    expected = torch.tensor(official("normalization").aug_normalized_adjacency(edges).toarray())
    found = official_adjacency(*normalised(batch), n).to_dense()
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-7)


def test_layer(official, batch):
    edges = normalised(batch)
    n = batch.num_nodes
    theirs = official("layers").ImplicitGraph(3, 64, n, kappa=0.9)
    ours = IGNNConv(3, 64, kappa=0.9, grad="ift(tol=1e-6, max_iter=100)", bias=False, f_tol=1e-7)
    utils = official("utils")
    rho = utils.get_spectral_rad(official_adjacency(*edges, n).coalesce())
    graph = Graph(*edges, n)
    assert graph.lambda_pf.item() == pytest.approx(rho, rel=1e-2)  # a bound from above
    # Inside the ball the projection is the identity for both, and so is its derivative.
    weight = project_rows(theirs.W.data, torch.tensor(0.89))
    with torch.no_grad():
        theirs.W.copy_(weight)
        ours.weight.copy_(weight)
        ours.omega.copy_(theirs.Omega_1)
    ours.lambda_pf = 1.0
    expected = theirs(None, official_adjacency(*edges, n), batch.x.mT, torch.relu, 1.0).mT
    found = ours(batch.x, graph)
    assert_close(found, expected)
    loss = torch.linspace(-1, 2, found.numel()).view(found.shape)
    (loss * expected).sum().backward()
    (loss * found).sum().backward()
    assert_close(ours.weight.grad, theirs.W.grad)
    assert_close(ours.omega.grad, theirs.Omega_1.grad)


def test_official_gradient_of_w_is_for_symmetric_graphs(official):
    # Why the layer is tested against dense algebra on directed graphs, and not against this.
    n = 6
    source, target = torch.arange(n - 1), torch.arange(1, n)
    weight = torch.full((n - 1,), 0.5)
    theirs = official("layers").ImplicitGraph(3, 4, n, kappa=0.9)
    ours = IGNNConv(3, 4, grad="ift(tol=1e-6)", bias=False, lambda_pf=1.0, f_tol=1e-7)
    with torch.no_grad():
        theirs.W *= 0.1
        ours.weight.copy_(theirs.W)
        ours.omega.copy_(theirs.Omega_1)
    x = torch.rand(n, 3)
    expected = theirs(None, official_adjacency(source, target, weight, n), x.mT, torch.relu, 1.0)
    found = ours(x, torch.stack([source, target]), weight)
    assert_close(found, expected.mT)
    expected.sum().backward()
    found.sum().backward()
    assert_close(ours.omega.grad, theirs.Omega_1.grad)
    assert (ours.weight.grad - theirs.W.grad).norm() > 1e-2 * theirs.W.grad.norm()


def test_graph_network(official, batch):
    try:
        models = official("models")
    except ModuleNotFoundError:
        pytest.skip("this folder has no model for graph classification")
    theirs = models.IGNN(3, 64, 2, None, dropout=0.5, kappa=0.9).eval()
    ours = IGNN(3, 64, 2, num_layers=3, f_tol=1e-7).eval()
    with torch.no_grad():
        for conv, layer in zip(ours.convs, (theirs.ig1, theirs.ig2, theirs.ig3), strict=True):
            conv.weight.copy_(layer.W)
            conv.omega.copy_(layer.Omega_1)
    ours.hidden.load_state_dict(theirs.V_0.state_dict())
    ours.out.load_state_dict(theirs.V_1.state_dict())
    adjacency = official_adjacency(*normalised(batch), batch.num_nodes)
    expected = theirs(batch.x.mT, adjacency, batch.batch)
    found = ours(batch.x, batch.edge_index, batch=batch.batch)
    assert_close(F.log_softmax(found, dim=1), expected)


def test_node_network(official, batch):
    try:
        models = official("models_PPI")
    except ModuleNotFoundError:
        pytest.skip("this folder has no model for PPI")
    theirs = models.IGNN(3, 16, 5, None, dropout=0.5, kappa=0.98).eval()
    ours = IGNN(3, (64, 32, 32, 16), 5, 5, "node", kappa=0.98, normalize=False, f_tol=1e-7).eval()
    adjacency = official_adjacency(*batch.edge_index, torch.ones(batch.num_edges), batch.num_nodes)
    rho = official("utils").get_spectral_rad(adjacency.coalesce())
    names = ("V_0", "V_1", "V_2", "V_3", "V")
    with torch.no_grad():
        for i, (conv, skip) in enumerate(zip(ours.convs, ours.skips, strict=True)):
            layer = getattr(theirs, f"ig{i + 1}")
            conv.weight.copy_(layer.W)
            conv.omega.copy_(layer.Omega_1)
            conv.lambda_pf = rho
            skip.load_state_dict(getattr(theirs, names[i]).state_dict())
    expected = theirs(batch.x.mT, adjacency)
    assert_close(ours(batch.x, batch.edge_index), expected)
