from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("torch_geometric")

import torch_geometric as pyg
from torch_geometric.data import Batch, Data
from torch_geometric.loader import NeighborLoader
from torch_geometric.nn.conv.gcn_conv import gcn_norm
from torch_geometric.sampler import BaseSampler, SamplerOutput

import deq_phantom_plugin as dpp
from conftest import evaluate
from deq_phantom_plugin.adapters.ignn import (
    ACTIVATIONS,
    IGNN,
    FixedPoint,
    Graph,
    IGNNConv,
    IGNNHost,
    perron,
    project_rows,
)
from deq_phantom_plugin.contract.errors import AssumptionWarning
from deq_phantom_plugin.hosts import registry as hosts

TIGHT = {"f_max_iter": 3000, "f_tol": 1e-15}
EXACT = "ift(tol=1e-13, max_iter=400)"


@pytest.fixture(autouse=True)
def _ignn_is_a_host(monkeypatch):
    monkeypatch.setitem(hosts._hosts, "ignn", IGNNHost())


def directed_graph(num_nodes=7, num_edges=16, dtype=torch.float64):
    """A directed graph with positive and negative weights and a self-loop."""
    edge_index = torch.randint(num_nodes, (2, num_edges))
    edge_index[:, 0] = 2
    edge_weight = torch.rand(num_edges, dtype=dtype) + 0.2
    edge_weight[::4] *= -1
    return edge_index, edge_weight


def adjacency(edge_index, edge_weight, num_nodes=7):
    """The paper's A, dense; parallel edges add up."""
    zeros = edge_weight.new_zeros(num_nodes, num_nodes)
    return zeros.index_put(tuple(edge_index), edge_weight, accumulate=True)


def features(num_nodes=7, channels=3, dtype=torch.float64):
    return torch.randn(num_nodes, channels, dtype=dtype)


def make_conv(grad=EXACT, activation="tanh", inside=True, **settings):
    conv = IGNNConv(3, 4, grad=grad, activation=activation, **{**TIGHT, **settings}).double()
    with torch.no_grad():
        if conv.bias is not None:
            conv.bias.normal_()
        if inside:
            conv.weight *= 0.05
    return conv


def tensors(conv, *more):
    return [*conv.parameters(), *more]


def flat(grads):
    return torch.cat([g.flatten() for g in grads])


def gradient(conv, wrt, *args):
    out = conv(*args)
    loss = (torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape) * out).sum()
    return flat(torch.autograd.grad(loss, wrt))


# --- against the closed form and dense algebra --------------------------------------------------


@pytest.mark.parametrize("inside", [True, False], ids=["W inside the ball", "W projected"])
@pytest.mark.parametrize("grad", [EXACT, "exact"])
def test_identity_activation_is_a_linear_system(grad, inside):
    # X = W X A + B, features x nodes: (I - A^T kron W) vec(X) = vec(B), columns stacked.
    conv = make_conv(grad, "identity", inside)
    (edge_index, edge_weight), x = directed_graph(), features()
    edge_weight.requires_grad_()
    x.requires_grad_()
    wrt = tensors(conv, x, edge_weight)

    a = adjacency(edge_index, edge_weight)
    radius = 0.9 / torch.linalg.eigvals(a.abs()).abs().max()  # differentiated, too
    w = conv.weight if inside else project_rows(conv.weight, radius)
    b = conv.omega @ x.mT @ a + conv.bias[:, None]
    system = torch.eye(28, dtype=torch.float64) - torch.kron(a.mT.contiguous(), w)
    expected = torch.linalg.solve(system, b.mT.reshape(-1)).view(7, 4)

    found = conv(x, edge_index, edge_weight)
    assert (found - expected).norm() < 1e-8 * expected.norm()
    loss = torch.linspace(-1, 2, 28, dtype=torch.float64).view(7, 4)
    reference = flat(torch.autograd.grad((loss * expected).sum(), wrt))
    error = (gradient(conv, wrt, x, edge_index, edge_weight) - reference).norm()
    assert error < 1e-8 * reference.norm()


@pytest.mark.parametrize("activation", ["relu", "tanh", "elu", torch.nn.Softplus()])
def test_directed_weighted_graph_is_the_dense_iteration(activation):
    conv = make_conv(activation=activation)
    (edge_index, edge_weight), x = directed_graph(), features()
    edge_weight.requires_grad_()
    x.requires_grad_()
    wrt = tensors(conv, x, edge_weight)
    a = adjacency(edge_index, edge_weight)
    assert not torch.allclose(a, a.mT)
    phi = ACTIVATIONS.get(activation, activation)
    state = torch.zeros(4, 7, dtype=torch.float64)
    for _ in range(300):
        state = phi(conv.weight @ state @ a + conv.omega @ x.mT @ a + conv.bias[:, None])
    torch.testing.assert_close(conv(x, edge_index, edge_weight), state.mT, rtol=1e-10, atol=1e-12)
    loss = torch.linspace(-1, 2, 28, dtype=torch.float64).view(7, 4)
    reference = flat(torch.autograd.grad((loss * state.mT).sum(), wrt))
    for args in ((edge_index, edge_weight), (Graph(*edge_index, edge_weight, 7),)):
        found = gradient(conv, wrt, x, *args)
        torch.testing.assert_close(found, reference, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("grad", "tolerance"),
    [
        (EXACT, 1e-8),
        ("ift(solver='bicgstab', tol=1e-12, max_iter=400)", 1e-8),
        ("ift(solver='fixed_point', tol=1e-12, max_iter=400)", 1e-8),
        ("upg(k=300, lam=1.0)", 1e-8),
        ("upg(k=600, lam=0.5)", 1e-8),
        ("upg(k=300, lam='adaptive', checkpoint=True)", 1e-8),
        ("npg(k=300, lam=1.0)", 1e-8),
        ("npg(k=600, lam=0.5)", 1e-8),
        ("npg(k=300, lam='adaptive')", 1e-8),
        ("bptt(steps=400)", 1e-8),
        ("schedule({0: 'exact'})", 1e-12),
        ("jfb", 1.0),
    ],
)
def test_strategies_against_exact(grad, tolerance):
    conv = make_conv("exact", inside=False)
    (edge_index, edge_weight), x = directed_graph(), features()
    dpp.set_step(conv, 0)
    wrt = tensors(conv)
    reference = gradient(conv, wrt, x, edge_index, edge_weight)
    assert dpp.set_grad(conv, grad) == 1
    found = gradient(conv, wrt, x, edge_index, edge_weight)
    assert (found - reference).norm() < tolerance * reference.norm()


def test_phantom_gradients_agree_with_one_another():
    conv = make_conv("upg(k=4, lam=0.6)")
    args = (features(), *directed_graph())
    wrt = tensors(conv)
    found = {}
    for grad in ("upg(k=4, lam=0.6)", "npg(k=4, lam=0.6)", "upg(k=1, lam=1.0)", "jfb"):
        dpp.set_grad(conv, grad)
        found[grad] = gradient(conv, wrt, *args)
    torch.testing.assert_close(found["npg(k=4, lam=0.6)"], found["upg(k=4, lam=0.6)"])
    torch.testing.assert_close(found["jfb"], found["upg(k=1, lam=1.0)"])
    assert not torch.allclose(found["jfb"], found["upg(k=4, lam=0.6)"])


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("spec", ["upg(k={}, lam=1.0)", "upg(k={}, lam=0.5)", "npg(k={}, lam=0.7)"])
def test_a_k_step_gradient_sees_k_hops(spec, k):
    # On a chain, dL/dx of the last node's state reaches the nodes that are at most k edges away.
    chain = torch.stack([torch.arange(9), torch.arange(1, 10)])
    conv = make_conv(spec.format(k), lambda_pf=1.0)
    x = features(10).requires_grad_()
    (grad,) = torch.autograd.grad(conv(x, chain)[-1].sum(), x)
    assert (grad.abs().sum(1) > 0).nonzero().flatten().tolist() == list(range(9 - k, 9))


def test_a_one_step_gradient_still_teaches_w_what_came_from_afar():
    # The solve has carried the signal; W's gradient is made of the states where the error is.
    chain = torch.stack([torch.arange(9), torch.arange(1, 10)])
    conv = make_conv("jfb", "identity", inside=False, lambda_pf=1.0, bias=False)
    x = torch.zeros(10, 3, dtype=torch.float64)
    x[0, 0] = 1
    w, omega = torch.autograd.grad(conv(x, chain)[-1].sum(), [conv.weight, conv.omega])
    assert w.any()
    assert not omega.any()


def test_nodes_are_not_samples():
    conv = make_conv()
    args = (features(), *directed_graph())
    seen = []

    def spy(func, equilibrium, context):
        seen.append(context.batch_dim)
        return dpp.attach(func, equilibrium, EXACT, context)

    wrt = tensors(conv)
    reference = gradient(conv, wrt, *args)
    dpp.set_grad(conv, spy)
    torch.testing.assert_close(gradient(conv, wrt, *args), reference)
    assert seen == [None]

    def found_out(func, equilibrium, context):
        return dpp.attach(func, equilibrium, EXACT)

    # Said by nobody, it is found out.
    dpp.set_grad(conv, found_out)
    with pytest.warns(AssumptionWarning, match="batch_dim=None"):
        got = gradient(conv, wrt, *args)
    torch.testing.assert_close(got, reference)


def test_differentiable_twice_by_bptt():
    conv = make_conv("bptt(steps=6)")
    (edge_index, edge_weight), x = directed_graph(), features()

    def function(x, edge_weight):
        graph = Graph(*edge_index, edge_weight, 7)
        return graph.propagate(graph.propagate(x).tanh(), bias=x)

    inputs = (x.requires_grad_(), edge_weight.requires_grad_())
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    (grad,) = torch.autograd.grad(conv(x, edge_index).sum(), x, create_graph=True)
    assert torch.isfinite(torch.autograd.grad(grad.square().sum(), conv.omega)[0]).all()


# --- well-posedness ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_lambda_pf_of_random_graphs(seed):
    torch.manual_seed(seed)
    edge_index, edge_weight = directed_graph(30, 150)
    expected = torch.linalg.eigvals(adjacency(edge_index, edge_weight, 30).abs()).abs().max()
    found = Graph(*edge_index, edge_weight, 30).lambda_pf
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=0)
    assert found >= expected * (1 - 1e-12)


def test_lambda_pf_of_special_graphs():
    def of(edges, num_nodes):
        source, target = torch.tensor(edges, dtype=torch.long).view(-1, 2).mT
        return Graph(source, target, torch.ones(len(source)), num_nodes).lambda_pf.item()

    star = [(0, i) for i in range(1, 10)]
    bipartite = star + [(j, i) for i, j in star]
    clique = [(i, j) for i in range(20, 24) for j in range(20, 24) if i != j]
    cycle = [(i, (i + 1) % 12) for i in range(12)]
    assert of(bipartite, 10) == pytest.approx(3, rel=1e-5)
    # The star has the larger degree, the clique of another component the same eigenvalue.
    assert of(bipartite + clique, 24) == pytest.approx(3, rel=1e-5)
    assert of(cycle, 12) == pytest.approx(1, rel=1e-5)
    assert of([(0, 0)], 3) == pytest.approx(1, rel=1e-5)
    assert of([], 3) == 0
    assert of([], 0) == 0
    assert of(star, 10) == 0  # acyclic


def test_lambda_pf_is_computed_once_and_its_slope_only_where_it_is_trained(monkeypatch):
    found = []
    leading = perron._leading
    monkeypatch.setattr(perron, "_leading", lambda *args: found.append(1) or leading(*args))
    edge_index, edge_weight = directed_graph()
    trained = edge_weight.clone().requires_grad_()
    conv, x = make_conv(inside=False), features()
    with pytest.warns(dpp.AssumptionWarning, match="in evaluation mode"):
        for _ in range(2):
            conv(x, edge_index, edge_weight).sum().backward()
            conv.eval()(x, edge_index, trained)
            with torch.no_grad():
                conv.train()(x, edge_index, trained)
    assert len(found) == 1  # the right vector
    for _ in range(2):
        conv(x, edge_index, trained).sum().backward()
    assert len(found) == 2  # and the left one
    twin = Graph(*edge_index, edge_weight, 7).with_weight(trained)
    assert twin.lambda_pf.requires_grad
    assert not Graph(*edge_index, edge_weight, 7).lambda_pf.requires_grad


def test_normalised_graphs_have_eigenvalue_one():
    edge_index = directed_graph(20, 60)[0]
    (source, target), weight = gcn_norm(edge_index, None, 20, dtype=torch.float64)
    found = Graph(source, target, weight, 20).lambda_pf
    torch.testing.assert_close(found, torch.ones_like(found), rtol=1e-5, atol=0)


def test_projection_is_onto_the_ball():
    weight, radius = torch.randn(40, 9, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    found = project_rows(weight, radius)
    torch.testing.assert_close(found.abs().sum(1), torch.full((40,), 0.7, dtype=torch.float64))
    for row, image in zip(weight, found, strict=True):
        # The soft threshold that brings the norm to the radius, by bisection.
        low, high = 0.0, row.abs().max().item()
        for _ in range(80):
            middle = (low + high) / 2
            inside = (row.abs() - middle).clamp_min(0).sum() < radius
            low, high = (low, middle) if inside else (middle, high)
        torch.testing.assert_close(image, row.sign() * (row.abs() - low).clamp_min(0))
    torch.testing.assert_close(project_rows(found * 0.99, radius), found * 0.99, rtol=0, atol=0)
    infinite = torch.tensor(torch.inf, dtype=torch.float64)
    assert torch.equal(project_rows(weight, infinite), weight)
    assert torch.isfinite(project_rows(torch.full((2, 3), 1e8), torch.tensor(0.9))).all()


def test_the_layer_is_well_posed_whatever_w_is():
    conv = make_conv(inside=False)
    with torch.no_grad():
        conv.weight *= 100
    x, (edge_index, edge_weight) = features(), directed_graph()
    graph = Graph(*edge_index, edge_weight, 7)
    before = conv.weight.detach().clone()
    state = conv(x, edge_index, edge_weight)
    norm = conv.projected_weight(graph).abs().sum(1).max()
    assert norm <= 0.9 / torch.linalg.eigvals(adjacency(edge_index, edge_weight).abs()).abs().max()
    torch.testing.assert_close(conv.equilibrium_func(x, graph)(state), state)
    assert torch.equal(conv.weight, before)  # the optimiser's alone


def test_two_forwards_before_one_backward():
    conv = make_conv(inside=False)
    x = features()
    (first, _), (second, _) = directed_graph(), directed_graph(7, 40)
    separate = sum(gradient(conv, tensors(conv), x, edges) for edges in (first, second))
    a, b = conv(x, first), conv(x, second)
    probe = torch.linspace(-1, 2, 28, dtype=torch.float64).view(7, 4)
    together = flat(torch.autograd.grad((probe * (a + b)).sum(), tensors(conv)))
    torch.testing.assert_close(together, separate)


# --- graphs as PyG has them ----------------------------------------------------------------------


def test_all_forms_of_a_graph():
    conv = make_conv()
    x, (edge_index, edge_weight) = features(), directed_graph()
    expected = conv(x, edge_index, edge_weight)
    adj_t = adjacency(edge_index, edge_weight).mT
    forms = [adj_t.to_sparse_csr(), adj_t.to_sparse_coo(), adj_t.to_sparse_csc()]
    for form in forms:
        torch.testing.assert_close(conv(x, form), expected)
    if hasattr(pyg, "EdgeIndex"):  # since PyG 2.5
        edges = pyg.EdgeIndex(edge_index, sparse_size=(7, 7))
        torch.testing.assert_close(conv(x, edges, edge_weight), expected)
    torch.testing.assert_close(conv(x, Graph(*edge_index, edge_weight, 7)), expected)
    ones = torch.ones_like(edge_weight)
    torch.testing.assert_close(conv(x, edge_index), conv(x, edge_index, ones))

    class SparseTensor:  # as torch_sparse has it
        def sizes(self):
            return [7, 7]

        def coo(self):
            return edge_index[1], edge_index[0], edge_weight

    torch.testing.assert_close(conv(x, SparseTensor()), expected)


def test_parallel_edges_add_up():
    conv, x = make_conv(), features()
    twice = torch.tensor([[0, 1, 1], [1, 2, 2]])
    once = torch.tensor([[0, 1], [1, 2]])
    weight = torch.tensor([1.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(conv(x, twice), conv(x, once, weight))


@torch.no_grad()
def test_mini_batch_is_its_graphs():
    conv = make_conv(lambda_pf=6.0).eval()
    graphs = [Data(x=features(n), edge_index=directed_graph(n, 3 * n)[0]) for n in (3, 7, 5)]
    batch = Batch.from_data_list(graphs)
    found = conv(batch.x, batch.edge_index, batch=batch.batch)
    torch.testing.assert_close(found, torch.cat([conv(g.x, g.edge_index) for g in graphs]))


def test_sequential():
    model = pyg.nn.Sequential(
        "x, edge_index",
        [(IGNNConv(3, 8), "x, edge_index -> x"), nn.ReLU(), (IGNNConv(8, 2), "x, edge_index -> x")],
    )
    edge_index = directed_graph()[0]
    out = model(features(dtype=torch.float32), edge_index)
    assert out.shape == (7, 2)
    assert dpp.set_grad(model, "npg") == 2


class EveryNeighbour(BaseSampler):
    """All nodes within two hops, for a NeighborLoader without pyg-lib."""

    def __init__(self, edge_index):
        self.edge_index = edge_index

    def sample_from_nodes(self, index):
        seeds = index.node
        nodes = pyg.utils.k_hop_subgraph(seeds, 2, self.edge_index)[0]
        nodes = torch.cat([seeds, nodes[~torch.isin(nodes, seeds)]])
        kept = torch.isin(self.edge_index, nodes).all(0)
        place = torch.full((int(self.edge_index.max()) + 1,), -1)
        place[nodes] = torch.arange(len(nodes))
        row, col = place[self.edge_index[:, kept]]
        return SamplerOutput(
            nodes, row, col, kept.nonzero().flatten(), metadata=(index.input_id, index.time)
        )

    def sample_from_edges(self, index, neg_sampling=None):
        raise NotImplementedError


@torch.no_grad()
def test_neighbour_sampling():
    # A reach of two hops in the batches is enough where the state falls fast from hop to hop.
    data = Data(x=features(40), edge_index=torch.stack([torch.arange(39), torch.arange(1, 40)]))
    conv = make_conv(lambda_pf=20.0, inside=False).eval()
    full = conv(data.x, data.edge_index)
    seen = 0
    for batch in NeighborLoader(
        data, [], neighbor_sampler=EveryNeighbour(data.edge_index), batch_size=8, shuffle=True
    ):
        assert 8 < batch.num_nodes < 40
        found = conv(batch.x, batch.edge_index)[: batch.batch_size]
        torch.testing.assert_close(found, full[batch.n_id[: batch.batch_size]], rtol=0, atol=0.01)
        seen += len(found)
    assert seen == 40


@torch.no_grad()
def test_subgraphs_one_after_another():
    conv = make_conv().eval()
    x, (edge_index, edge_weight) = features(), directed_graph()
    for nodes in ([0, 1, 2, 3], [2, 5, 6], list(range(7))):
        part, weight = pyg.utils.subgraph(nodes, edge_index, edge_weight, relabel_nodes=True)
        fresh = copy.deepcopy(conv)
        torch.testing.assert_close(conv(x[nodes], part, weight), fresh(x[nodes], part, weight))


@torch.no_grad()
def test_a_graph_changed_in_place_is_a_new_graph():
    conv = make_conv().eval()
    x, (edge_index, edge_weight) = features(), directed_graph()
    conv(x, edge_index, edge_weight)
    edge_weight.data.mul_(3)
    torch.testing.assert_close(
        conv(x, edge_index, edge_weight), copy.deepcopy(conv)(x, edge_index, edge_weight)
    )
    edge_index.data[1] = edge_index[1].roll(1)
    torch.testing.assert_close(
        conv(x, edge_index, edge_weight), copy.deepcopy(conv)(x, edge_index, edge_weight)
    )
    matrix = adjacency(edge_index, edge_weight).mT.to_sparse_csr()
    conv(x, matrix)
    matrix.values().mul_(0.5)
    torch.testing.assert_close(conv(x, matrix), copy.deepcopy(conv)(x, matrix))


def test_a_graph_is_prepared_once(monkeypatch):
    made = []
    original = Graph.__init__
    monkeypatch.setattr(
        Graph, "__init__", lambda self, *args: made.append(1) or original(self, *args)
    )
    conv, x, (edge_index, edge_weight) = make_conv(), features(), directed_graph()
    for _ in range(3):
        conv(x, edge_index.clone(), edge_weight.clone())
    assert len(made) == 1
    model = IGNN(3, 4, 2, num_layers=3).double()
    model(x, edge_index)
    model(x, edge_index)
    assert len(made) == 2


# --- manners of a layer --------------------------------------------------------------------------


def test_repr_and_reset():
    conv = IGNNConv(3, 4, grad="npg(k=9)")
    assert repr(conv) == "IGNNConv(3, 4, kappa=0.9, grad='npg(k=9, lam=0.5)')"
    before = [p.clone() for p in conv.parameters()]
    conv.reset_parameters()
    assert not torch.equal(conv.weight, before[0])
    assert not conv.bias.any()
    assert IGNNConv(3, 4, bias=False).bias is None


def test_eval_and_no_grad_return_the_equilibrium():
    conv = make_conv("upg")
    x, edge_index = features(), directed_graph()[0]
    graph = Graph(*edge_index, torch.ones(16, dtype=torch.float64), 7)
    with torch.no_grad():
        trained = conv(x, edge_index)
    with pytest.warns(dpp.AssumptionWarning, match="in evaluation mode"):
        out = conv.eval()(x, edge_index)
    assert not out.requires_grad
    torch.testing.assert_close(trained, out, rtol=0, atol=0)
    torch.testing.assert_close(conv.equilibrium_func(x, graph)(out), out)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_after_a_forward(copied):
    model = IGNN(3, 4, 2, num_layers=2, activation="identity")
    x, edge_index = features(dtype=torch.float32), directed_graph()[0]
    model(x, edge_index).sum().backward()
    twin = copied(model)
    torch.testing.assert_close(evaluate(model, x, edge_index), evaluate(twin, x, edge_index))
    other = IGNN(3, 4, 2, num_layers=2, activation="identity", grad="npg")
    other.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(evaluate(model, x, edge_index), evaluate(other, x, edge_index))


def test_autocast():
    conv = IGNNConv(3, 4, f_tol=1e-3)
    x, edge_index = features(dtype=torch.float32), directed_graph()[0]
    full = conv(x, edge_index)
    with torch.autocast("cpu", torch.bfloat16):
        out = conv(x, edge_index)
    out.sum().backward()
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, full, rtol=0.1, atol=0.1)
    assert torch.isfinite(conv.weight.grad).all()


def test_no_message_is_lost_when_the_solve_stops_short():
    conv = make_conv(inside=False, f_max_iter=2, lambda_pf=0.2)
    with pytest.warns(dpp.ConvergenceWarning, match=r"f_max_iter=2.*f_tol=1e-15"):
        conv(features(), *directed_graph())


def test_large_states_converge_in_float32():
    conv = IGNNConv(3, 4)
    conv(1e6 * features(dtype=torch.float32), directed_graph()[0])
    assert conv.equilibrium.nfe < 300


# --- with the rest of the package ----------------------------------------------------------------


def test_the_host_is_installed():
    from importlib.metadata import entry_points

    (point,) = entry_points(group="deq_phantom_plugin.hosts", name="ignn")
    assert point.load() is IGNNHost


def test_layers_need_no_package_but_pytorch(tmp_path):
    # The networks do: for their pooling and normalisation.
    program = """
import sys
sys.modules["torch_geometric"] = None
import torch
import deq_phantom_plugin as dpp
from deq_phantom_plugin.adapters.ignn import IGNN, IGNNConv
conv = IGNNConv(3, 4)
conv(torch.rand(5, 3), torch.tensor([[0, 1], [1, 2]])).sum().backward()
assert dpp.set_grad(conv, "npg") == 1
IGNN(3, 4, 2, 2, "node", normalize=False)
try:
    IGNN(3, 4, 2)
except ImportError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.strip() == (
        'torch_geometric is not installed: pip install "deq-phantom-plugin[graph]"'
    )


def test_switching_and_stepping():
    model = IGNN(3, 4, 2, num_layers=3)
    assert dpp.set_grad(model, "npg(k=3)") == 3
    assert all(m.grad == dpp.NPG(k=3) for m in model.modules() if isinstance(m, FixedPoint))
    with pytest.raises(ValueError, match="unknown strategy"):
        dpp.set_grad(model, "nope")
    dpp.set_grad(model, "schedule({0: 'jfb', 10: 'bptt(steps=7)'})")
    calls = []
    conv = model.convs[0]
    original = conv.equilibrium_func
    conv.equilibrium_func = lambda *a: (
        lambda func: lambda h: calls.append(torch.is_grad_enabled()) or func(h)
    )(original(*a))
    args = features(dtype=torch.float32), directed_graph()[0]
    dpp.set_step(model, 3)
    model(*args)
    assert calls.count(True) == 1
    assert calls.count(False) > 3
    calls.clear()
    dpp.set_step(model, 10)
    model(*args)
    assert calls == [True] * 7  # owns the solve: the layer skips its own
    assert conv.equilibrium.nfe == 7
    assert model.state_dict()["convs.0.equilibrium.memory.step"] == 10


def test_model_report():
    model = IGNN(3, 4, 2, num_layers=2, f_tol=1e-12, f_max_iter=1000).double()
    args = {"x": features(), "edge_index": directed_graph()[0]}
    grads = ["ift(tol=1e-10, max_iter=200)", "npg(k=200, lam=1.0)", "exact", "jfb"]
    report = dpp.model_report(model, args, lambda out: out.square().sum(), grads, repeats=1)
    assert [r.name for r in report.reports] == ["convs.0.equilibrium", "convs.1.equilibrium"]
    for equilibrium in report.reports:
        rows = {row.strategy: row for row in equilibrium.results}
        assert all(row.error is None for row in rows.values()), rows
        assert rows["npg(k=200, lam=1.0)"].relative_error < 1e-6


def test_monitor():
    model = IGNN(3, 4, 2, num_layers=1, grad="ift(tol=1e-6)")
    seen = []
    with dpp.monitor(model, lambda numbers, step: seen.append(numbers), every=1):
        model(features(dtype=torch.float32), directed_graph()[0]).sum().backward()
    (numbers,) = seen
    assert numbers["convs.0.equilibrium/cosine"] == pytest.approx(1, abs=1e-4)
    assert numbers["convs.0.equilibrium/forward_residual"] < 1e-5
    assert numbers["convs.0.equilibrium/spectral_radius"] < 0.9
    assert numbers["convs.0.equilibrium/nfe"] == model.convs[0].equilibrium.nfe
    seen.clear()
    model(features(dtype=torch.float32), directed_graph()[0]).sum().backward()
    assert not seen


# --- the networks --------------------------------------------------------------------------------


def test_graph_classification():
    model = IGNN(3, 8, 5, num_layers=3, task="graph").double()
    graphs = [Data(x=features(n), edge_index=directed_graph(n, 3 * n)[0]) for n in (3, 7)]
    batch = Batch.from_data_list(graphs)
    out = evaluate(model, batch.x, batch.edge_index, batch=batch.batch)
    assert out.shape == (2, 5)
    alone = torch.cat([evaluate(model, g.x, g.edge_index) for g in graphs])
    torch.testing.assert_close(out, alone, rtol=1e-3, atol=1e-4)
    F.cross_entropy(
        model.train()(batch.x, batch.edge_index, batch=batch.batch), torch.tensor([0, 1])
    )
    expected = (3 * 8 + 8 * 8) + 2 * (8 * 8 + 8 * 8) + (8 * 8 + 8) + (8 * 5 + 5)
    assert sum(p.numel() for p in model.parameters()) == expected  # as the official code's, biases
    # of the implicit layers apart, which it has and does not use


def test_node_classification_with_one_layer():
    model = IGNN(3, 8, 2, num_layers=1, task="node")
    x, edge_index = features(dtype=torch.float32), directed_graph()[0]
    assert model(x, edge_index).shape == (7, 2)
    assert [tuple(p.shape) for p in model.parameters()] == [(8, 8), (8, 3), (2, 8)]


def test_node_classification_with_skips():
    model = IGNN(50, (16, 8, 8, 4), 121, 5, task="node", kappa=0.98, normalize=False)
    x, edge_index = features(7, 50, dtype=torch.float32), directed_graph()[0]
    out = model(x, edge_index)
    out.square().mean().backward()
    assert out.shape == (7, 121)
    assert [c.out_channels for c in model.convs] == [16, 8, 8, 4, 121]
    assert all(p.grad is not None for p in model.parameters())
    before = model.skips[0].weight.clone()
    model.reset_parameters()
    assert not torch.equal(before, model.skips[0].weight)


def test_edge_weights_learn_through_the_normalisation():
    model = IGNN(3, 4, 2, num_layers=1, task="node", grad=EXACT, **TIGHT).double().train()
    model.dropout = 0.0
    x, edge_index = features(), directed_graph(7, 12)[0]
    weight = (torch.rand(12, dtype=torch.float64) + 0.5).requires_grad_()
    probe = torch.randn(7, 2, dtype=torch.float64)
    (found,) = torch.autograd.grad((probe * model(x, edge_index, weight)).sum(), weight)
    step = torch.randn(12, dtype=torch.float64)
    values = [
        (probe * evaluate(model, x, edge_index, weight.detach() + e * step)).sum()
        for e in (-1e-6, 1e-6)
    ]
    slope = (values[1] - values[0]) / 2e-6
    assert (found @ step).item() == pytest.approx(slope.item(), rel=1e-4)


def test_parallel_self_loops_add_up_before_they_are_normalised():
    model = IGNN(3, 4, 2, num_layers=1, task="node", grad=EXACT, dropout=0.0, **TIGHT).double()
    x = features()
    thrice = torch.tensor([[0, 0, 0, 3], [0, 0, 1, 3]])
    weight = torch.tensor([1.0, 2.0, 3.0, 0.5], dtype=torch.float64, requires_grad=True)
    once = torch.tensor([[0, 0, 3], [0, 1, 3]])
    summed = torch.tensor([3.0, 3.0, 0.5], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(model(x, thrice, weight).square().sum(), weight)
    (expected,) = torch.autograd.grad(model(x, once, summed).square().sum(), summed)
    torch.testing.assert_close(model(x, thrice, weight), model(x, once, summed))
    torch.testing.assert_close(found, expected[[0, 0, 1, 2]])


# --- bad input -----------------------------------------------------------------------------------


def test_no_edges_and_isolated_nodes():
    conv = make_conv("ift", "relu")
    x, none = features(), torch.empty(2, 0, dtype=torch.long)
    out = conv(x, none)
    torch.testing.assert_close(out, conv.bias.relu().expand(7, 4))
    out.sum().backward()
    assert torch.isfinite(conv.bias.grad).all()
    edge_index = torch.tensor([[0, 1], [1, 0]])
    out = conv(x, edge_index)
    torch.testing.assert_close(out[2:], conv.bias.relu().expand(5, 4))
    assert conv(x[:0], none).shape == (0, 4)


def test_self_loops_are_edges():
    conv = make_conv(activation="identity")
    x = features(1)
    loop, weight = torch.zeros(2, 1, dtype=torch.long), torch.tensor([0.5], dtype=torch.float64)
    b = 0.5 * x @ conv.omega.mT + conv.bias
    system = torch.eye(4, dtype=torch.float64) - 0.5 * conv.weight
    expected = torch.linalg.solve(system, b[0])[None]
    torch.testing.assert_close(conv(x, loop, weight), expected)


def test_bad_graphs():
    conv, x = make_conv(), features()
    edge_index, edge_weight = directed_graph()
    far = edge_index.clone()
    far[1, 3] = 7
    negative = edge_index.clone()
    negative[0, 0] = -1
    graph = Graph(*edge_index, edge_weight, 7)
    cases = [
        ((x, far), r"edge_index holds 7, but x has 7 nodes; expected 0 to 6"),
        ((x, negative), r"edge_index holds -1"),
        ((x, edge_index.double()), r"float64; expected torch.int64"),
        ((x, edge_index.mT), r"shape \(16, 2\); expected \(2, edges\)"),
        ((x, edge_index, edge_weight[1:]), r"edge_weight has shape \(15,\); expected \(16,\)"),
        ((x, edge_index, edge_weight / 0), r"edge_weight holds 16 NaN or infinite"),
        ((x, torch.eye(5).to_sparse_csr()), r"adj_t is 5 x 5, but x has 7 nodes"),
        ((x, torch.eye(7).to_sparse_csr(), edge_weight), r"beside a sparse matrix"),
        ((x, [[0], [1]]), r"edge_index is a list"),
        ((x[:, :2], edge_index), r"x has shape \(7, 2\); expected \(num_nodes, 3\)"),
        ((x[:5], graph), r"the Graph has 7 nodes, but x has 5"),
        ((x, graph, edge_weight), r"edge_weight beside a Graph"),
        ((x, edge_index.bool()), r"bool; expected torch.int64"),
    ]
    for args, message in cases:
        with pytest.raises(ValueError, match=message):
            conv(*args)
    x[2, 1] = torch.nan
    for model in (conv, conv.eval(), IGNN(3, 4, 2).double()):
        with pytest.raises(ValueError, match="x holds 1 NaN or infinite"):
            model(x, edge_index)


def test_networks_refuse_bad_edges_before_they_normalise():
    model, x = IGNN(3, 4, 2).double(), features()
    edge_index, edge_weight = directed_graph()
    with pytest.raises(ValueError, match="edge_weight holds 4 negative numbers; normalize=True"):
        model(x, edge_index, edge_weight)
    with pytest.raises(ValueError, match="edge_index holds 7, but x has 7 nodes"):
        model(x, edge_index + 7 - edge_index.max())
    graph = model.prepare(x, edge_index)
    with pytest.raises(ValueError, match="the Graph has 7 nodes, but x has 6"):
        model(x[:6], graph)


def test_nan_in_a_parameter_is_an_error_of_the_solve():
    conv = make_conv(grad="upg")
    with torch.no_grad():
        conv.omega[0, 0] = torch.nan
    with pytest.raises(dpp.NonFiniteError, match="NaN or infinite states in 4 iterations"):
        conv(features(), *directed_graph())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kappa": 1.0}, r"kappa=1.0; expected a number above 0 and below 1"),
        ({"kappa": 1.5}, r"kappa=1.5"),
        ({"kappa": 0}, r"kappa=0"),
        ({"kappa": float("nan")}, r"kappa=nan"),
        ({"activation": "gelu"}, r"activation='gelu'; expected one of elu, identity"),
        ({"grad": "nope"}, r"unknown strategy 'nope'"),
        ({"f_max_iter": 0}, r"f_max_iter=0"),
        ({"f_tol": -1.0}, r"f_tol=-1.0"),
        ({"lambda_pf": 0.0}, r"lambda_pf=0.0"),
        ({"out_channels": 0}, r"out_channels=0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        IGNNConv(**{"in_channels": 3, "out_channels": 4, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "edge"}, r"task='edge'; expected 'graph' or 'node'"),
        ({"num_layers": 0}, r"num_layers=0"),
        ({"dropout": 1.0}, r"dropout=1.0"),
        ({"hidden_channels": (4, 4)}, r"hidden_channels=\(4, 4\); expected one number, or 3"),
        ({"kappa": 1.0}, r"kappa=1.0"),
    ],
)
def test_bad_networks(settings, message):
    with pytest.raises(ValueError, match=message):
        IGNN(**{"in_channels": 3, "hidden_channels": 4, "out_channels": 2, **settings})
