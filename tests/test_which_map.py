"""One equilibrium for several maps: they are told apart, and not asked about for ever."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.identity import identity


class Blocks(nn.Module):
    """Two blocks by turns through one equilibrium; the second one couples samples."""

    def __init__(self, grad, how="closure"):
        super().__init__()
        torch.manual_seed(0)
        second = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.blocks = nn.ModuleList([nn.Linear(4, 4), second])
        self.equilibrium = dpp.Equilibrium("fixed_point", grad, tol=1e-10, max_iter=400)
        self.how = how
        with torch.no_grad():
            self.blocks[0].weight.mul_(0.3)
            self.blocks[1][1].weight.fill_(0.1)
        self.double()

    def func(self, i, x, h):
        return torch.tanh(self.blocks[i](h) + x)

    def forward(self, x):
        for i in range(2):
            func = lambda h, x=x: self.func(i, x, h)  # noqa: E731, B023
            if self.how == "partial":
                func = functools.partial(self.func, i, x)
            elif self.how == "default":
                func = lambda h, i=i, x=x: self.func(i, x, h)  # noqa: E731
            x = self.equilibrium(func, torch.zeros_like(x))
        return x

    def unrolled(self, x):
        for i in range(2):
            h = torch.zeros_like(x)
            for _ in range(300):
                h = self.func(i, x, h)
            x = h
        return x


def gradients(output, model):
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(output.square().sum(), [*model.parameters()])]
    )


@pytest.mark.filterwarnings("ignore:the samples of the batch depend on one another")
@pytest.mark.parametrize("how", ["closure", "partial", "default"])
@pytest.mark.parametrize("grad", ["ift(tol=1e-10)", "npg(k=300, lam='adaptive')", "exact"])
def test_blocks_by_their_number_are_told_apart(grad, how):
    torch.manual_seed(5)
    model, x = Blocks(grad, how), torch.randn(6, 4, dtype=torch.float64)
    exact = gradients(model.unrolled(x), model)
    for _ in range(3):  # from the first step on
        found = gradients(model(x), model)
        assert (found - exact).norm() < 1e-6 * exact.norm()


def test_a_number_that_counts_steps_is_not_asked_about_for_ever():
    layer = nn.Linear(4, 4)
    equilibrium = dpp.Equilibrium("fixed_point", "ift(tol=1e-3)", tol=1e-3)
    torch.manual_seed(0)
    evaluations = []

    def step(number):
        def func(h):
            evaluations.append(number)  # `number` is in the closure
            return torch.tanh(0.3 * layer(h) + x)

        x = torch.randn(6, 4)
        equilibrium(func, torch.zeros(6, 4)).sum().backward()
        return evaluations.count(number) - equilibrium.last.nfe

    spent = [step(number) for number in range(1000, 1100)]
    assert min(spent[:32]) == 3  # each is another map: two evaluations to look, one for the graph
    assert len(equilibrium.memory.findings) <= 34
    assert sum(n > 1 for n in spent[40:]) <= 3  # the steps at which every map is asked about again


def test_identity_of_functions():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)

    def made(module, number):
        return lambda h: module(h) * number

    assert identity(made(a, 1)) == identity(made(a, 1)) != identity(made(b, 1))
    assert identity(made(a, 1)) != identity(made(a, 2))
    assert identity(made(a, 1))[:-1] == identity(made(a, 2))[:-1]
    assert identity(made(a, torch.ones(1))) == identity(made(a, torch.zeros(1)))
    assert identity(functools.partial(made, a, 1)) != identity(functools.partial(made, a, 2))
