"""IGNN in the hands of PyTorch Geometric: its explainers, wrappers, loaders and dtypes."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy

pytest.importorskip("torch_geometric")

import torch_geometric as pyg
from torch_geometric.data import Data
from torch_geometric.explain import (
    AttentionExplainer,
    Explainer,
    GNNExplainer,
    GraphMaskExplainer,
    PGExplainer,
)
from torch_geometric.explain.algorithm.utils import clear_masks, set_masks
from torch_geometric.explain.metric import fidelity
from torch_geometric.loader import DataLoader

from deq_phantom_plugin.adapters.ignn import IGNN, Graph, IGNNConv, project_rows

TIGHT = {"f_max_iter": 3000, "f_tol": 1e-15}
EXACT = "ift(tol=1e-13, max_iter=400)"
NODES, EDGES = 7, 16


@pytest.fixture(autouse=True)
def _nothing_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for theirs in ("Sparse invariant", "Sparse CS", "Converting a tensor", "`torch.jit"):
            warnings.filterwarnings("ignore", theirs)
        yield


def graph(dtype=torch.float64, loops=1):
    """Features and a directed graph without parallel edges, whose first edges are self-loops."""
    places = torch.randperm(NODES * NODES)
    places = places[places // NODES != places % NODES][: EDGES - loops]
    loop = torch.arange(loops).expand(2, -1)
    edge_index = torch.cat([loop, torch.stack([places // NODES, places % NODES])], dim=1)
    return torch.randn(NODES, 3, dtype=dtype), edge_index


def double_conv(**settings):
    conv = IGNNConv(3, 4, grad=EXACT, activation="tanh", **TIGHT, **settings).double()
    nn.init.normal_(conv.weight)
    nn.init.normal_(conv.bias)
    return conv


def equilibrium(weight, omega, bias, a, x):
    """The dense iteration on nodes x features, in float64; differentiable."""
    state = torch.zeros(len(x), len(weight), dtype=x.dtype)
    for _ in range(400):
        state = torch.tanh(a.mT @ state @ weight.mT + a.mT @ x @ omega.mT + bias)
    return state


def dense(edge_index, values):
    return values.new_zeros(NODES, NODES).index_put(tuple(edge_index), values, accumulate=True)


def results(model, *args, loss=lambda out: out.float().square().mean()):
    """The output and all gradients in one vector each, in float64."""
    out = model(*args)
    grads = torch.autograd.grad(loss(out), list(model.parameters()))
    return [out.detach().double(), torch.cat([grad.flatten().double() for grad in grads])]


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


# --- explanations --------------------------------------------------------------------------------


@pytest.mark.parametrize("apply_sigmoid", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_an_edge_mask_is_a_weight(apply_sigmoid, training):
    conv, (x, edge_index) = double_conv().train(training), graph()
    mask = torch.rand(EDGES, dtype=torch.float64).requires_grad_()
    values = mask.sigmoid() if apply_sigmoid else mask
    a = dense(edge_index, values)
    radius = 0.9 / torch.linalg.eigvals(a).abs().max()
    expected = equilibrium(project_rows(conv.weight, radius), conv.omega, conv.bias, a, x)
    probe = torch.randn_like(expected)
    (reference,) = torch.autograd.grad((probe * expected).sum(), mask)

    with torch.no_grad():
        before = conv(x, edge_index)
    set_masks(conv, mask, edge_index, apply_sigmoid)
    found = conv(x, edge_index)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(
        conv(x, Graph(*edge_index, torch.ones(EDGES).double(), NODES)), found
    )
    (got,) = torch.autograd.grad((probe * found).sum(), mask)
    assert error(got, reference) < 1e-8
    with torch.no_grad():
        assert not conv(x, edge_index).requires_grad
    clear_masks(conv)
    with torch.no_grad():
        assert torch.equal(conv(x, edge_index), before)


def test_a_mask_acts_after_the_normalisation_and_leaves_its_loops():
    model = IGNN(3, 4, 2, num_layers=1, task="node", grad=EXACT, activation="tanh", **TIGHT)
    model, (x, edge_index) = model.double().eval(), graph(loops=2)
    mask = torch.rand(EDGES, dtype=torch.float64).requires_grad_()
    conv = model.convs[0]

    ones = dense(edge_index, torch.ones(EDGES, dtype=torch.float64))
    with_loops = ones.fill_diagonal_(1.0)
    scale = with_loops.sum(0).rsqrt()
    normalised = scale[:, None] * with_loops * scale
    off_diagonal = dense(edge_index, mask) * (1 - torch.eye(NODES, dtype=torch.float64))
    a = normalised * (off_diagonal + torch.eye(NODES, dtype=torch.float64))
    state = equilibrium(project_rows(conv.weight, torch.tensor(0.9)), conv.omega, 0.0, a, x)
    expected = model.out(nn.functional.normalize(state, dim=-1))
    probe = torch.randn_like(expected)
    (reference,) = torch.autograd.grad((probe * expected).sum(), mask)

    set_masks(model, mask, edge_index, apply_sigmoid=False)
    found = model(x, edge_index)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    (got,) = torch.autograd.grad((probe * found).sum(), mask)
    assert error(got, reference) < 1e-8
    assert not got[:2].any()  # of the self-loops


@pytest.mark.parametrize("task", ["graph", "node"])
def test_explainer_and_fidelity(task):
    model, (x, edge_index) = (
        IGNN(3, 8, 2, num_layers=2, task=task, grad="ift"),
        graph(torch.float32),
    )
    config = {"mode": "multiclass_classification", "task_level": task, "return_type": "raw"}
    settings = {"node_mask_type": "attributes", "edge_mask_type": "object", "model_config": config}
    explainer = Explainer(model, GNNExplainer(epochs=3), "model", **settings)
    batch = {"batch": torch.zeros(NODES, dtype=torch.long)} if task == "graph" else {}
    keys = list(model.state_dict())
    explanation = explainer(x, edge_index, **batch)
    loop = edge_index[0] == edge_index[1]
    assert explanation.edge_mask[~loop].all()
    assert not explanation.edge_mask[loop].any()
    assert all(0 <= value <= 1 for value in fidelity(explainer, explanation))

    def masked(value):
        mask = torch.full((EDGES,), value)
        return explainer.get_masked_prediction(x, edge_index, edge_mask=mask, **batch)

    full = explainer.get_prediction(x, edge_index, **batch)
    torch.testing.assert_close(masked(1.0), full)
    alone = explainer.get_prediction(x, edge_index[:, :0], **batch)
    assert not torch.allclose(masked(0.0), full, atol=1e-3)
    assert not torch.allclose(masked(0.0), alone, atol=1e-3)  # the degrees are those of the graph
    assert model.training
    assert list(model.state_dict()) == keys


def test_pg_explainer_learns():
    model, (x, edge_index) = IGNN(3, 8, 2, num_layers=2, task="node"), graph(torch.float32)
    config = {"mode": "multiclass_classification", "task_level": "node", "return_type": "raw"}
    algorithm = PGExplainer(epochs=2)
    Explainer(model, algorithm, "phenomenon", edge_mask_type="object", model_config=config)
    index = int(edge_index[1, -1])  # one that edges lead to
    target = torch.zeros(NODES, dtype=torch.long)
    algorithm.train(0, model, x, edge_index, target=target, index=index)  # gives it its sizes
    before = [p.clone() for p in algorithm.parameters()]
    algorithm.train(1, model, x, edge_index, target=target, index=index)
    assert any(not torch.equal(a, b) for a, b in zip(before, algorithm.parameters(), strict=True))


def test_a_mask_that_does_not_fit_is_refused():
    conv, (x, edge_index) = IGNNConv(3, 4), graph(torch.float32)
    set_masks(conv, torch.ones(EDGES - 1), edge_index[:, 1:])
    with pytest.raises(ValueError, match="the edge mask has 15 entries"):
        conv(x, edge_index)
    clear_masks(conv)
    conv.explain = True
    with pytest.raises(ValueError, match="without an edge mask"):
        conv(x, edge_index)
    conv.explain = False
    before = conv(x, edge_index)
    set_masks(conv, torch.zeros(EDGES), edge_index)
    torch.testing.assert_close(conv(x, edge_index), before)


def test_what_waits_for_single_messages_is_refused():
    x, edge_index = graph(torch.float32)
    config = {"mode": "multiclass_classification", "task_level": "node", "return_type": "raw"}
    settings = {"edge_mask_type": "object", "model_config": config}
    for algorithm, more in (
        (AttentionExplainer(), {}),
        (GraphMaskExplainer(1, epochs=1, log=False), {"node_mask_type": "object"}),
    ):
        explainer = Explainer(IGNNConv(3, 4), algorithm, "model", **settings, **more)
        with pytest.raises(NotImplementedError, match="no single messages"):
            explainer(x, edge_index)
    conv = IGNNConv(3, 4)
    handle = conv.register_propagate_forward_pre_hook(lambda module, inputs: inputs)
    with pytest.raises(NotImplementedError, match="no single messages"):
        conv(x, edge_index)
    handle.remove()
    conv(x, edge_index)
    conv.flow = "target_to_source"
    with pytest.raises(ValueError, match=r"Pass edge_index.flip\(0\)"):
        conv(x, edge_index)


# --- several node and edge types -----------------------------------------------------------------


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = IGNNConv(-1, 4), IGNNConv(4, 4)

    def forward(self, x, edge_index):
        return self.second(self.first(x, edge_index).relu(), edge_index)


SAME = [("user", "knows", "user"), ("user", "follows", "user")]
THERE_AND_BACK = [("user", "rates", "item"), ("item", "rated_by", "user")]


def test_edge_types_within_one_node_type():
    x, edge_index = graph(torch.float32)
    edges = dict(zip(SAME, (edge_index, edge_index.flip(0)), strict=True))
    convs = {kind: IGNNConv(3, 4) for kind in SAME}
    expected = sum(convs[kind](x, edges[kind]) for kind in SAME)
    found = pyg.nn.HeteroConv(convs)({"user": x}, edges)["user"]
    torch.testing.assert_close(found, expected)

    model = pyg.nn.to_hetero(TwoLayers(), (["user"], SAME))
    found = model({"user": x}, edges)["user"]
    for layer in (model.first, model.second):
        x = sum(layer["__".join(kind)](x, edges[kind]) for kind in SAME)
        x = x.relu() if layer is model.first else x
    torch.testing.assert_close(found, x)


@pytest.mark.parametrize("missing", [False, True])
def test_pairs_of_node_types_are_refused(missing):
    x, edge_index = graph(torch.float32)
    edges = dict.fromkeys(THERE_AND_BACK, edge_index)
    both = {"user": x, "item": x}
    for model in (
        pyg.nn.HeteroConv({kind: IGNNConv(3, 4) for kind in THERE_AND_BACK}),
        pyg.nn.to_hetero(TwoLayers(), (["user", "item"], THERE_AND_BACK)),
    ):
        with pytest.raises(ValueError, match=r"x is a pair .*bipartite.*within one node type"):
            model(both, edges)
    for model in (IGNNConv(3, 4), IGNN(3, 4, 2)):
        with pytest.raises(ValueError, match="x is a pair"):
            model((x, None if missing else x), edge_index)
    with pytest.raises(ValueError, match="is a pair, for two node types"):
        IGNNConv((3, 3), 4)


def test_wrappers_that_cannot_be_are_refused():
    x, edge_index = graph(torch.float32)
    with pytest.raises(ValueError, match=r"placeholder of torch\.fx.*to_hetero.*IGNNConv"):
        pyg.nn.to_hetero(IGNN(3, 4, 2), (["user"], SAME))
    model = pyg.nn.to_hetero_with_bases(TwoLayers(), (["user"], SAME), num_bases=2)
    with pytest.raises(NotImplementedError, match="to_hetero_with_bases"):
        model({"user": x}, dict.fromkeys(SAME, edge_index))


# --- features and dtypes -------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["coo", "csr", "csc"])
@pytest.mark.parametrize("task", ["graph", "node"])
def test_sparse_features_are_dense_ones(layout, task):
    x, edge_index = graph()
    x = x * (x > 0)
    sparse = getattr(x, f"to_sparse_{layout}")()
    for model in (double_conv(), IGNN(-1, 4, 2, task=task, dropout=0.0, grad=EXACT).double()):
        found = results(model, sparse, edge_index)
        for a, b in zip(found, results(model, x, edge_index), strict=True):
            torch.testing.assert_close(a, b)
        wrong = getattr((x / 0).nan_to_num(posinf=torch.inf), f"to_sparse_{layout}")()
        with pytest.raises(ValueError, match="NaN or infinite"):
            model(wrong, edge_index)


def test_features_that_cannot_be_are_named():
    conv, (x, edge_index) = IGNNConv(3, 4), graph(torch.float32)

    class SparseTensor:
        """As torch_sparse has it."""

    cases = [
        (x.long(), "x has dtype torch.int64; expected real floating-point"),
        (x > 0, "x has dtype torch.bool"),
        (x + 0j, "x has dtype torch.complex64"),
        (x[None], r"x has shape \(1, 7, 3\); expected \(num_nodes, 3\)"),
        (SparseTensor(), r"x is a SparseTensor; .*to_torch_sparse_csr_tensor"),
        (None, "x is a NoneType"),
    ]
    for features, message in cases:
        with pytest.raises(ValueError, match=message):
            conv(features, edge_index)


def scaled(out):
    """A loss as GradScaler scales it."""
    return 100 * out.float().square().mean()


NETWORKS = {
    "graph": lambda: IGNN(3, 8, 2, num_layers=2, dropout=0.0, grad="ift"),
    "node": lambda: IGNN(3, 8, 2, 1, "node", dropout=0.0, grad="ift"),
    "skips": lambda: IGNN(3, 8, 2, 3, "node", normalize=False, grad="upg"),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_in_16_bits(dtype):
    # With an eigenvalue of 1, W begins near the surface of its ball, which rounding must not cross.
    conv, (x, _) = IGNNConv(3, 8, grad="npg(k=9)", lambda_pf=1.0), graph(torch.float32)
    edge_index = torch.stack([torch.arange(NODES), torch.arange(NODES).roll(1)])
    expected = results(conv, x, edge_index, loss=scaled)
    for low in (conv, copy.deepcopy(conv).to(dtype)):  # beside other layers under autocast, too
        assert low(x.to(dtype), edge_index).dtype == dtype
        found = results(low, x.to(dtype), edge_index, loss=scaled)
        assert error(found[0], expected[0]) < 0.01
        assert error(found[1], expected[1]) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_in_16_bits(dtype, network):
    model, (x, edge_index) = NETWORKS[network]().to(dtype), graph(dtype)
    # Near what these numbers give in 32 bits.
    expected = results(copy.deepcopy(model).float(), x.float(), edge_index, loss=scaled)
    found = results(model, x, edge_index, loss=scaled)
    assert model(x, edge_index).dtype == dtype
    assert error(found[0], expected[0]) < 0.02
    assert error(found[1], expected[1]) < 0.05
    values = torch.ones(EDGES, dtype=dtype)
    adj_t = torch.sparse_coo_tensor(edge_index.flip(0), values, (NODES, NODES))
    torch.testing.assert_close(model(x, adj_t), model(x, edge_index))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_under_autocast(dtype, network):
    model, (x, edge_index) = NETWORKS[network](), graph(torch.float32)
    expected = results(model, x, edge_index)
    with torch.autocast("cpu", dtype):
        out = model(x, edge_index)
        conv = model.convs[0]
        inside = conv(x, edge_index)
    torch.testing.assert_close(inside, conv(x, edge_index))  # solved in 32 bits
    assert error(out.double(), expected[0]) < 0.02
    grads = torch.autograd.grad(out.float().square().mean(), list(model.parameters()))
    assert error(torch.cat([grad.flatten().double() for grad in grads]), expected[1]) < 0.05


def test_a_state_of_zeros_has_no_direction_in_16_bits():
    model = IGNN(3, 4, 2, num_layers=1, task="node").half()
    out = model(torch.zeros(NODES, 3).half(), graph()[1])
    assert not out.any()


@torch.no_grad()
def test_many_nodes_are_added_in_32_bits():
    # One after another in bfloat16, a sum of equal numbers stands still at 256 of them.
    model = IGNN(3, 4, 2, num_layers=1, dropout=0.0).eval()
    x, edge_index = torch.rand(1, 3).expand(2000, 3), torch.empty(2, 0, dtype=torch.long)
    low = copy.deepcopy(model).bfloat16()(x.bfloat16(), edge_index)
    assert error(low.double(), model(x, edge_index).double()) < 0.05


# --- a size that is not known yet ----------------------------------------------------------------


@pytest.mark.parametrize("inference", [False, True])
def test_in_channels_of_the_first_features(inference):
    x, edge_index = graph(torch.float32)
    for make in (
        lambda: IGNNConv(-1, 4),
        lambda: IGNN(-1, 4, 2, num_layers=2),
        lambda: IGNN(-1, 4, 2, 3, "node", normalize=False),
    ):
        model = make().double()
        assert any(is_lazy(p) for p in model.parameters())
        twin = copy.deepcopy(model)
        with torch.inference_mode() if inference else torch.no_grad():
            model.eval()(x.double(), edge_index)
        assert not any(is_lazy(p) for p in model.parameters())
        assert all(p.dtype == torch.float64 for p in model.parameters())
        assert any(is_lazy(p) for p in twin.parameters())
        model.train()(x.double(), edge_index).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        twin.load_state_dict(model.state_dict())
        with torch.no_grad():
            found, expected = (m.eval()(x.double(), edge_index) for m in (twin, model))
        torch.testing.assert_close(found, expected)


def test_a_lazy_layer_until_then():
    conv = IGNNConv(-1, 4)
    assert repr(conv).startswith("IGNNConv(-1, 4, ")
    conv.reset_parameters()
    other = IGNNConv(-1, 4)
    other.load_state_dict(conv.state_dict())
    assert set(conv.state_dict()) == set(IGNNConv(3, 4).state_dict())
    assert is_lazy(other.omega)
    torch.testing.assert_close(other.weight, conv.weight)
    assert is_lazy(pickle.loads(pickle.dumps(conv)).omega)
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
    x, edge_index = graph(torch.float32)
    conv(x, edge_index).square().sum().backward()
    before = conv.omega.clone()
    optimizer.step()
    assert repr(conv).startswith("IGNNConv(3, 4, ")
    assert conv.omega.abs().max() <= 4**-0.5 + 0.1 * conv.omega.grad.abs().max()
    assert not torch.equal(conv.omega, before)
    with pytest.raises(ValueError, match=r"x has shape \(7, 2\); expected \(num_nodes, 3\)"):
        conv(x[:, :2], edge_index)


@pytest.mark.parametrize("size", [0, -2, 3.0, True])
def test_sizes_that_cannot_be(size):
    with pytest.raises(ValueError, match=r"in_channels=.*or -1 for that of the first features"):
        IGNNConv(size, 4)
    with pytest.raises(ValueError, match=r"out_channels=.*of at least 1$"):
        IGNNConv(3, size)


# --- batches -------------------------------------------------------------------------------------


@torch.no_grad()
def test_graphs_without_nodes_have_scores():
    model, (x, edge_index) = IGNN(3, 4, 2).double().eval(), graph()
    batch = torch.ones(NODES, dtype=torch.long)  # none in the first and in the last of three
    found = model(x, edge_index, batch=batch, batch_size=3)
    (alone,) = model(x, edge_index)
    (empty,) = model(x[:0], edge_index[:, :0])
    torch.testing.assert_close(found, torch.stack([empty, alone, empty]))
    assert model(x, edge_index, batch=batch).shape == (2, 2)
    assert model(x, edge_index, batch_size=1).shape == (1, 2)
    for wrong, message in (
        ({"batch": batch, "batch_size": 1}, "batch holds 1 to 1, with batch_size=1"),
        ({"batch": batch - 2}, "batch holds -1 to -1"),
        ({"batch_size": 3}, "batch_size=3 without batch"),
        ({"batch": batch[1:]}, r"batch has shape \(6,\); expected \(7,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model(x, edge_index, **wrong)


@pytest.mark.parametrize("grad", ["upg", "npg", "ift", "jfb", "bptt(steps=3)", "exact"])
def test_no_nodes(grad):
    model, none = IGNN(3, 4, 2, num_layers=2, grad=grad), torch.empty(2, 0, dtype=torch.long)
    batch = torch.empty(0, dtype=torch.long)
    out = model(torch.empty(0, 3), none, batch=batch, batch_size=2)
    out.sum().backward()
    assert out.shape == (2, 2)
    assert all(not p.grad.any() for conv in model.convs for p in conv.parameters())


@torch.no_grad()
def test_loaders():
    model = IGNN(3, 4, 2).double().eval()
    graphs = [Data(*graph()) for _ in range(4)] + [
        Data(torch.empty(0, 3).double(), graph()[1][:, :0])
    ]
    alone = torch.cat([model(g.x, g.edge_index) for g in graphs])
    batches = DataLoader(graphs, batch_size=5)
    (found,) = [model(b.x, b.edge_index, batch=b.batch, batch_size=b.num_graphs) for b in batches]
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


# --- manners of PyG's layers ---------------------------------------------------------------------


def test_pygs_tools_know_the_layer():
    conv = IGNNConv(3, 4)
    assert isinstance(conv, pyg.nn.MessagePassing)
    assert conv.explain is None
    assert [name for name, _ in conv.named_parameters()] == ["weight", "omega", "bias"]
    shallow = copy.copy(conv)
    assert shallow.omega is conv.omega


def test_a_pickle_of_before_it_was_one_of_pygs_layers():
    conv, (x, edge_index) = IGNNConv(3, 4), graph(torch.float32)
    theirs = set(vars(pyg.nn.MessagePassing())) - set(vars(nn.Module()))
    state = {name: value for name, value in vars(conv).items() if name not in theirs}
    state["_modules"] = {k: v for k, v in conv._modules.items() if k != "aggr_module"}
    old = IGNNConv.__new__(IGNNConv)
    old.__setstate__(state)
    torch.testing.assert_close(old(x, edge_index), conv(x, edge_index))
    set_masks(old, torch.zeros(EDGES), edge_index, apply_sigmoid=False)
    torch.testing.assert_close(old(x, edge_index), conv.bias.relu().expand(NODES, 4))
