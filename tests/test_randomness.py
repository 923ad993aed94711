"""Same seed, same run; and an F that draws numbers draws the same ones where it should."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchdeq import get_deq

import deq_phantom_plugin as dpp

SPECS = [
    "bptt(steps=4)",
    "exact",
    "guard('ift')",
    "ift",
    "ift(higher_order=True)",
    "ift(warm_start=True)",
    "jfb",
    "npg",
    "npg(lam='adaptive')",
    "npg_rr",
    "reversible(steps=3)",
    "shine",
    "upg",
    "upg(k=3, checkpoint=True)",
    "upg(lam='adaptive')",
]


class Model(nn.Module):
    """Dropout around the equilibrium, and inside F a mask that lasts for one solve."""

    def __init__(self, grad):
        super().__init__()
        self.inject, self.inner, self.out = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 2)
        self.dropout = nn.Dropout(0.3)
        solver = "broyden_fast" if grad == "shine" else "fixed_point_iter"
        self.deq = get_deq(grad=grad, f_solver=solver, f_max_iter=30, f_tol=1e-5)

    def forward(self, x):
        u = self.dropout(self.inject(x))
        mask = self.dropout(torch.ones_like(u))
        func = lambda h: torch.tanh(0.5 * self.inner(mask * h) + u)  # noqa: E731
        return self.out(self.deq(func, torch.zeros_like(u))[0][-1])


@pytest.fixture(autouse=True)
def hooked():
    with dpp.enabled("torchdeq"):
        yield


def trained(spec, seed, steps=4):
    torch.manual_seed(seed)
    model = Model(spec)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(steps):
        dpp.set_step(model, step)
        optimizer.zero_grad()
        model(torch.randn(5, 6)).square().mean().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()], torch.get_rng_state()


@pytest.mark.parametrize("spec", SPECS)
def test_the_same_seed_gives_the_same_run_bit_by_bit(spec):
    first, state = trained(spec, seed=1)
    again, state_again = trained(spec, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(state, state_again)
    other, _ = trained(spec, seed=2)
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("spec", sorted({*SPECS} - {"npg_rr"}))
def test_strategies_draw_nothing(spec):
    """The random numbers of a training do not depend on its method; `npg_rr` is drawn."""
    torch.manual_seed(1)
    model = Model(spec)
    x = torch.randn(5, 6)
    torch.manual_seed(3)
    model.eval()
    model.dropout.train()
    with torch.no_grad():
        model(x)
    expected = torch.get_rng_state()
    torch.manual_seed(3)
    model.train()
    model(x).sum().backward()
    assert torch.equal(torch.get_rng_state(), expected)


def dropped(spec):
    """A gradient through an F that draws a new mask in every evaluation."""
    torch.manual_seed(0)
    linear = nn.Linear(8, 8).double()
    func = lambda h: torch.tanh(nn.functional.dropout(0.5 * linear(h), 0.3))  # noqa: E731
    torch.manual_seed(5)
    attached = dpp.attach(func, torch.ones(4, 8, dtype=torch.float64), spec)
    torch.rand(7)  # whatever is drawn until backward does not matter
    return torch.autograd.grad(attached.square().sum(), list(linear.parameters()))


def test_checkpointed_steps_draw_the_same_masks_again():
    for a, b in zip(dropped("upg(k=3)"), dropped("upg(k=3, checkpoint=True)"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore:h is no equilibrium")
def test_products_on_one_graph_see_one_mask():
    """J^T is that of the evaluation that carries the gradient, in every product."""
    for spec in ("npg(k=4)", "ift(tol=1e-12, max_iter=50)"):
        torch.manual_seed(0)
        weight = (0.1 * torch.randn(8, 8, dtype=torch.float64)).requires_grad_()
        masks = []

        def func(h, weight=weight, masks=masks):
            masks.append(nn.functional.dropout(torch.ones_like(h), 0.3))
            return torch.tanh(h * masks[-1] @ weight)

        h = 0.1 * torch.ones(4, 8, dtype=torch.float64)
        told = dpp.Context(batch_dim=0)
        got = torch.autograd.grad(dpp.attach(func, h, spec, told).sum(), weight)[0]
        assert len(masks) == 1
        fixed = lambda h, mask=masks[0], w=weight: torch.tanh(h * mask @ w)  # noqa: E731
        want = torch.autograd.grad(dpp.attach(fixed, h, spec).sum(), weight)[0]
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
