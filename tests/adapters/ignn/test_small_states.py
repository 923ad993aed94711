"""Networks that divide states by their lengths: nodes of tiny states, and of none, count as much.

The head then sends a gradient of 1 / ||h_i|| to node i. The references are backpropagation through
many iterations in float64, written by hand or by `bptt`, which solve no adjoint system.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import deq_phantom_plugin as dpp

pytest.importorskip("torch_geometric")

from deq_phantom_plugin.adapters.ignn import IGNN

SOLVING = ["ift", "guard('ift', on_failure='raise')", "exact", "ift(solver='fixed_point')"]


def chains(length, number=4):
    """Return features and edges of chains whose first node alone has a feature."""
    nodes = torch.arange(length * number)
    sources = nodes[(nodes + 1) % length != 0]
    x = torch.zeros(len(nodes), 10)
    x[nodes % length == 0, (nodes // length % 2)[nodes % length == 0]] = 1
    return x, torch.stack([sources, sources + 1]), nodes // length % 2


def gradients(model, spec, x, edges, labels):
    dpp.set_grad(model, spec)
    model.zero_grad()
    F.cross_entropy(model(x, edges), labels).backward()
    return torch.cat([p.grad.flatten().double() for p in model.convs.parameters()])


def made(x, dtype=torch.float64, **settings):
    torch.manual_seed(3)
    model = IGNN(x.shape[1], 8, 3, 1, "node", dropout=0.0, **settings)
    return model.train().to(dtype)


@pytest.fixture
def graph():
    """Return a path of 11 nodes beside a node without features or edges."""
    generator = torch.Generator().manual_seed(0)
    ahead = torch.stack([torch.arange(10), torch.arange(1, 11)])
    x = torch.rand(12, 5, generator=generator, dtype=torch.float64)
    x[11] = 0
    labels = torch.randint(3, (12,), generator=generator)
    return x, torch.cat([ahead, ahead.flip(0)], dim=1), labels


def by_hand(model, x, edges, labels):
    """Backpropagate through 400 iterations of the layer's own F."""
    conv = model.convs[0]
    handed = []
    conv.equilibrium.forward = lambda func, start, explained=False: (
        handed.append((func, start)) or start
    )
    model(x, edges)
    del conv.equilibrium.forward
    ((func, h),) = handed
    for _ in range(400):
        h = func(h)
    model.zero_grad()
    F.cross_entropy(model.out(F.normalize(h, dim=-1)), labels).backward()
    return torch.cat([p.grad.flatten() for p in model.convs.parameters()])


@pytest.mark.parametrize("spec", SOLVING)
def test_a_node_without_a_state_does_not_hide_the_others(spec, graph):
    model = made(graph[0], f_tol=1e-12, f_max_iter=1000)
    model.convs[0].weight.data.copy_(0.2 * torch.rand(8, 8, dtype=torch.float64))
    reference = by_hand(model, *graph)
    with torch.no_grad():  # the case: one state is zero, so the head sends it 1 / 1e-12
        assert len(model.convs[0](graph[0], model.prepare(*graph[:2])).norm(dim=1).nonzero()) == 11
    found = gradients(model, spec, *graph)
    assert (found - reference).norm() < 2e-3 * reference.norm()
    cheap = gradients(model, "jfb", *graph)
    assert (cheap - reference).norm() > 0.05 * reference.norm()  # which `ift` once was


def test_a_report_ranks_methods_as_backpropagation_does(graph):
    model = made(graph[0], f_tol=1e-12, f_max_iter=1000)
    model.convs[0].weight.data.copy_(0.2 * torch.rand(8, 8, dtype=torch.float64))
    reference, cheap = by_hand(model, *graph), gradients(model, "jfb", *graph)
    x, edges, labels = graph
    loss = lambda scores: F.cross_entropy(scores, labels)  # noqa: E731
    inputs = {"x": x, "edge_index": edges}
    (report,) = dpp.model_report(
        model, inputs, loss, ["npg(k=100, lam=1.0)", "jfb"], repeats=1
    ).reports
    series, first = (result.cosine for result in report.results)
    assert series > 1 - 1e-6
    assert first == pytest.approx(float(F.cosine_similarity(cheap, reference, dim=0)), abs=1e-4)


@pytest.mark.parametrize("length", [10, 20, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ift_on_chains_is_the_implicit_gradient(length, dtype):
    x, edges, labels = chains(length)
    single = {"f_max_iter": 1000}
    model = made(x.to(dtype), dtype, **single)
    reference = made(x.double(), f_max_iter=1000)
    exact = gradients(reference, f"bptt(steps={3 * length + 100})", x.double(), edges, labels)
    found = gradients(model, "ift(max_iter=100)", x.to(dtype), edges, labels)
    assert (found - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.parametrize("length", [10, 20, 40])
def test_scores_at_the_default_tolerance_are_those_of_the_equilibrium(length):
    x, edges, _ = chains(length)
    model = made(x, torch.float32).eval()
    with torch.no_grad():
        found = model(x, edges)
        model.double().convs[0].equilibrium.f_tol = 0.0
        model.convs[0].equilibrium.f_max_iter = 200 + length
        with pytest.warns(dpp.ConvergenceWarning):
            wanted = model(x.double(), edges)
    # Below lengths of 1e-12 `F.normalize` itself lets the scores vanish.
    torch.testing.assert_close(found.double(), wanted, rtol=0.02, atol=1e-3)


def test_units_keep_every_number_of_the_state(graph):
    """Lengths are rounded to powers of two, so nothing is rounded by them."""
    model = made(graph[0].float(), torch.float32)
    x, edges, _ = graph
    with torch.no_grad():
        plain = model.eval()(x.float(), edges)
    dpp.set_grad(model, "npg")  # whose value is the state itself
    assert torch.equal(model.train()(x.float(), edges), plain)


def test_a_node_that_has_not_arrived_is_named():
    x, edges, _ = chains(40)
    model = made(x, torch.float32, f_max_iter=8, f_tol=1.0).eval()
    with pytest.warns(dpp.ConvergenceWarning, match="of a node's length, above 0.001"):
        model(x, edges)
