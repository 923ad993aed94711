"""An F that returns a tensor of the user's as it is: a parameter, or what was computed before."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import deq_phantom_plugin as dpp

SPECS = [
    "exact",
    "ift(tol=1e-12)",
    "ift(tol=1e-12, higher_order=True)",
    "npg(k=200, lam=1.0)",
    "upg(k=60, lam=1.0)",
    "bptt(steps=100)",
    "reversible(steps=40)",
]


class Problem:
    """h = tanh(W h + c) with c = p, where F's second leaf is p itself.

    Args:
        kind: what p is: a leaf, computed before, or a leaf that F uses in an operation as well.
    """

    def __init__(self, kind):
        torch.manual_seed(0)
        self.kind = kind
        self.weight = (0.3 * torch.randn(3, 3, dtype=torch.float64)).requires_grad_()
        self.leaf = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        self.p = self.leaf.sin() if kind == "computed" else self.leaf
        self.params = [self.weight, self.leaf]

    def func(self, state):
        h, c = state
        extra = 0.2 * self.p if self.kind == "used" else 0
        return torch.tanh(h @ self.weight.mT + c + extra), self.p

    def solved(self):
        state = torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64)
        with torch.no_grad():
            for _ in range(200):
                state = self.func(state)
        return tuple(leaf.detach().clone() for leaf in state)

    def loss(self, state):
        h, c = state
        scale = torch.linspace(-1, 2, h.numel(), dtype=h.dtype).view_as(h)
        return (scale * h).sin().sum() + (c * scale).square().sum()

    def reference(self):
        """The same by plain autograd: c is p, and the iteration of h is unrolled."""
        h, extra = torch.zeros_like(self.p), 0.2 * self.p if self.kind == "used" else 0
        for _ in range(200):
            h = torch.tanh(h @ self.weight.mT + self.p + extra)
        return self.loss((h, self.p))


def both_orders(loss, params):
    grads = torch.autograd.grad(loss, params, create_graph=True)
    total = sum(g.sin().sum() for g in grads)
    return [*grads, *torch.autograd.grad(total, params)]


@pytest.mark.parametrize("kind", ["leaf", "computed", "used"])
@pytest.mark.parametrize("spec", SPECS)
def test_its_gradient_is_that_of_the_unrolled_iteration(spec, kind):
    problem = Problem(kind)
    attached = dpp.attach(problem.func, problem.solved(), spec, dpp.Context(batch_dim=0))
    torch.testing.assert_close(attached[1].detach(), problem.p.detach())
    want = torch.autograd.grad(problem.reference(), problem.params, retain_graph=True)
    got = torch.autograd.grad(problem.loss(attached), problem.params)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["leaf", "computed", "used"])
@pytest.mark.parametrize("spec", ["ift(tol=1e-13, higher_order=True)", "reversible(steps=40)"])
def test_second_derivatives(spec, kind):
    problem = Problem(kind)
    want = both_orders(problem.reference(), problem.params)
    problem = Problem(kind)
    attached = dpp.attach(problem.func, problem.solved(), spec, dpp.Context(batch_dim=0))
    got = both_orders(problem.loss(attached), problem.params)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8)


def test_where_only_such_leaves_carry_a_gradient():
    leaf = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    state = torch.ones(2, 3, dtype=torch.float64)
    attached = dpp.attach(lambda h: leaf, state, "ift(higher_order=True)", dpp.Context(batch_dim=0))
    (slope,) = torch.autograd.grad((attached**3).sum(), leaf, create_graph=True)
    torch.testing.assert_close(slope, 3 * leaf**2)
    torch.testing.assert_close(torch.autograd.grad(slope.sum(), leaf)[0], 6 * leaf.detach())


@pytest.mark.parametrize("kind", ["leaf", "computed", "used"])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("goes_back", [True, False])
def test_no_hook_and_no_state_stays_with_it(spec, kind, goes_back):
    problem, made = Problem(kind), []

    def func(state):
        image = problem.func(state)
        made.append(weakref.ref(image[0]))
        return image

    attached = dpp.attach(func, problem.solved(), spec, dpp.Context(batch_dim=0))
    if goes_back:
        problem.loss(attached).backward(retain_graph=kind == "computed")
    del attached
    gc.collect()
    assert not problem.p._backward_hooks
    assert not problem.leaf._backward_hooks
    assert made
    assert not any(ref() is not None for ref in made)


def test_counting_leaves_no_hook_on_a_parameter_that_f_returns():
    from deq_phantom_plugin.adjoint.probe import CountedPasses

    parameter = torch.ones(4, 3, requires_grad=True)
    counted = CountedPasses(lambda state: (torch.tanh(state[0] + parameter), parameter))
    for _ in range(3):
        first, second = counted((torch.zeros(4, 3), torch.zeros(4, 3)))
    (first.sum() + second.sum()).backward()
    assert not parameter._backward_hooks
    assert (counted.n_evaluations, counted.n_vjp) == (3, 1)
    assert torch.equal(parameter.grad, 2 - torch.tanh(torch.ones(4, 3)).square())
