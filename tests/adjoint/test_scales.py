"""A residual that a few huge entries of the incoming gradient make small: found out and said."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import deq_phantom_plugin as dpp

SAID = "the gradient that comes in is far larger where the state is small"


@pytest.fixture
def graph():
    """Return F of a path of nodes and one node without a state, its equilibrium, and its weight."""
    generator = torch.Generator().manual_seed(0)
    adjacency = torch.diag(torch.full((11,), 0.5), 1)
    adjacency = F.pad((adjacency + adjacency.T), (0, 1, 0, 1)).double()
    weight = (0.12 * torch.rand(8, 8, generator=generator).double()).requires_grad_()
    x = torch.rand(13, 8, generator=generator).double()
    x[12] = 0

    def func(h):
        return torch.relu(adjacency @ h @ weight.T + x)

    h = torch.zeros_like(x)
    with torch.no_grad():
        for _ in range(200):
            h = func(h)
    return func, h, weight


def gradient(graph, spec, head):
    func, h, weight = graph
    out = dpp.attach(func, h, spec, dpp.Context(batch_dim=None))
    labels = torch.arange(13) % 8
    (found,) = torch.autograd.grad(F.cross_entropy(head(out), labels, reduction="sum"), weight)
    return found


def unrolled(graph, head):
    func, h, weight = graph
    for _ in range(200):
        h = func(h)
    loss = F.cross_entropy(head(h), torch.arange(13) % 8, reduction="sum")
    return torch.autograd.grad(loss, weight)[0]


@pytest.mark.parametrize("spec", ["ift", "ift(solver='bicgstab')", "ift(tol=1e-8)"])
def test_a_node_without_a_state_behind_a_normalisation_is_said(spec, graph):
    with pytest.warns(dpp.ConvergenceWarning, match=SAID):
        found = gradient(graph, spec, F.normalize)
    exact = unrolled(graph, F.normalize)
    assert (found - exact).norm() > 0.01 * exact.norm()  # the case: it is wrong


@pytest.mark.parametrize("head", [torch.clone, torch.tanh, lambda h: 1e-3 * h, lambda h: h[:1]])
def test_nothing_is_said_of_a_gradient_that_is_right(head, graph):
    if head(graph[1]).shape[0] == 1:  # a loss of one node alone
        head = lambda h: h[:1].expand(13, 8)  # noqa: E731
    exact = unrolled(graph, head)
    assert (gradient(graph, "ift", head) - exact).norm() < 1e-3 * exact.norm()


def test_units_of_length_as_the_warning_advises(graph):
    func, h, weight = graph
    size = h.norm(dim=1, keepdim=True).clamp_min(1e-12)
    scaled = (lambda u: func(size * u) / size, h / size, weight)
    found = gradient(scaled, "ift", lambda u: F.normalize(size * u))
    exact = unrolled(graph, F.normalize)
    assert (found - exact).norm() < 1e-3 * exact.norm()


def test_no_product_is_spent_where_the_sizes_are_alike(graph):
    func, h, _ = graph
    products = []

    def counted(state):
        image = func(state)
        image.register_hook(lambda v: products.append(v))
        return image

    told = []
    context = dpp.Context(batch_dim=None, monitor=told.append)
    dpp.attach(counted, h, "ift", context).square().sum().backward()
    # The hook sees each product of the solve, and the last one to the parameters.
    assert len(products) in (told[0].n_vjp, told[0].n_vjp + 1)


@pytest.mark.parametrize("tol", [0.05, 0.3, 0.9])
def test_a_loose_tolerance_is_no_reason_to_say_it(tol, graph):
    """The residual may then be of that size in any norm."""
    gradient(graph, f"ift(tol={tol})", torch.tanh)
