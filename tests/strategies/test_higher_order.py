"""`ift(higher_order=True)`: derivatives of any order, against backprop through a long iteration."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint
from torchdeq import get_deq

import deq_phantom_plugin as dpp
from conftest import equilibria
from deq_phantom_plugin.testing import make_equilibrium

SPEC = "ift(tol=1e-13, max_iter=200, higher_order=True)"


def unrolled(func, state, steps=200):
    """The equilibrium by iteration from zero, all of it in the graph: the reference."""
    state = tree_map(torch.zeros_like, state)
    for _ in range(steps):
        state = func(state)
    return state


def solved(func, like, spec=SPEC, context=None):
    with torch.no_grad():
        state = unrolled(func, like)
    return dpp.attach(func, state, spec, context)


def derivatives(loss, params, order):
    """The gradients of a loss, of a scalar function of these, and so on."""
    found = []
    for _ in range(order):
        grads = torch.autograd.grad(loss, params, create_graph=True)
        found.append(torch.cat([g.detach().flatten() for g in grads]))
        loss = sum((g.sin() * torch.linspace(-1, 2, g.numel()).view_as(g)).sum() for g in grads)
    return found


def assert_same(problem, order, context=None, spec=SPEC):
    want = derivatives(problem.probe(unrolled(problem.func, problem.state)), problem.params, order)
    got = derivatives(
        problem.probe(solved(problem.func, problem.state, spec, context)), problem.params, order
    )
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm()


def test_four_derivatives():
    assert_same(make_equilibrium([(3, 4)], norm=0.7), 4)


@given(equilibria(coupled=False))
def test_any_state(drawn):
    problem, _ = drawn
    assert_same(problem, 2)


@given(equilibria(coupled=True))
def test_any_coupled_state(drawn):
    problem, _ = drawn
    assert_same(problem, 2, dpp.Context(batch_dim=None))


@pytest.mark.parametrize("solver", ["gmres", "bicgstab", "anderson", "broyden", "fixed_point"])
def test_any_solver(solver):
    problem = make_equilibrium([(3, 4)], norm=0.6)
    assert_same(problem, 2, spec=SPEC.replace("(", f"(solver={solver!r}, "))


def test_gradcheck_and_gradgradcheck():
    problem = make_equilibrium([(2, 3), (2, 2)], lambda leaves: {"a": leaves[0], "b": leaves[1]})
    weight, inject = problem.params

    def model(weight, inject):
        def func(state):
            rows = torch.cat([state["a"], state["b"]], dim=1)
            out = torch.tanh(rows @ weight.mT + inject)
            return {"a": out[:, :3], "b": out[:, 3:]}

        return tuple(solved(func, problem.state).values())

    assert torch.autograd.gradcheck(model, (weight, inject))
    assert torch.autograd.gradgradcheck(model, (weight, inject))


def test_first_derivatives_are_those_of_plain_ift():
    problem = make_equilibrium([(4, 6)], norm=0.9)
    want = problem.gradient(SPEC.replace(", higher_order=True", ""))
    torch.testing.assert_close(problem.gradient(SPEC), want, rtol=1e-12, atol=1e-12)
    value = dpp.attach(problem.func, problem.state, SPEC)
    torch.testing.assert_close(value, problem.func(problem.state).detach(), rtol=0, atol=0)


def test_captured_tensors_that_depend_on_one_another():
    """Each counts by what func does with it, not by what it is made of."""
    torch.manual_seed(0)
    weight = (0.3 * torch.randn(4, 4, dtype=torch.float64)).requires_grad_()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def loss(make):
        injection = x @ weight  # depends on the weight that func uses as well
        scale = injection.square().mean().sigmoid()
        func = lambda h: torch.tanh(scale * h @ weight.mT + injection)  # noqa: E731
        h = make(func, torch.zeros(3, 4, dtype=torch.float64))
        return (h * injection).sum()  # and is used again behind the equilibrium

    for a, b in zip(
        derivatives(loss(solved), (weight, x), 3),
        derivatives(loss(unrolled), (weight, x), 3),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_gradients_of_tensors_between():
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    injection = weight * torch.ones(2, 3, dtype=torch.float64)
    h = solved(lambda h: torch.tanh(weight * h + injection), injection)
    got = torch.autograd.grad(h.sum(), injection)[0]
    want = unrolled(lambda h: torch.tanh(weight * h + injection), injection)
    torch.testing.assert_close(got, torch.autograd.grad(want.sum(), injection)[0])


class Block(torch.nn.Module):
    """Modules that hold, derive and share parameters."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(6, 6))
        self.norm = torch.nn.LayerNorm(6)
        self.conv = torch.nn.Conv1d(1, 1, 3, padding=1)
        self.gain = torch.nn.Parameter(torch.tensor(0.3))

    def forward(self, h, x):
        h = self.gain * self.norm(self.inner(h)) + self.conv(h[:, None]).squeeze(1) * 0.1
        return torch.tanh(h * self.gain + x)


def test_modules():
    block = Block().double()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    params = [*block.parameters(), x]
    func = lambda h: block(h, x)  # noqa: E731
    got = derivatives(solved(func, x).square().sum(), params, 2)
    want = derivatives(unrolled(func, x).square().sum(), params, 2)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_in_torchdeq():
    block = Block().double()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    params = [*block.parameters(), x]
    func = lambda a, b: [block(b, x), 0.5 * torch.tanh(block.gain * a)]  # noqa: E731
    start = [torch.zeros_like(x), torch.zeros_like(x)]
    with dpp.enabled("torchdeq"):
        deq = get_deq(grad=SPEC, f_max_iter=200, f_tol=1e-14).train()
        (state,), _ = deq(func, start)
        got = derivatives(sum(s.square().sum() for s in state), params, 2)
    want = unrolled(lambda s: func(*s), start)
    want = derivatives(sum(s.square().sum() for s in want), params, 2)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x.square() * grad


def test_custom_functions_of_states_work():
    problem = make_equilibrium([(3, 4)], norm=0.5)
    func = problem.func
    problem.func = lambda h: func(h + 0.1 * Cube.apply(h))
    assert_same(problem, 2)


class Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        return x * 0.5 + y

    @staticmethod
    def backward(ctx, grad):
        return 0.5 * grad, grad


@pytest.mark.filterwarnings("ignore:h is no equilibrium")
@pytest.mark.parametrize("also_seen", [False, True])
@pytest.mark.parametrize("is_leaf", [False, True])
def test_what_cannot_be_seen_is_refused(is_leaf, also_seen):
    leaf = torch.full((2, 3), 0.4, dtype=torch.float64, requires_grad=True)
    hidden = leaf if is_leaf else leaf.sin()

    def func(h):
        out = Add.apply(h, hidden)
        return torch.tanh(out * hidden) if also_seen else torch.tanh(out)

    with pytest.raises(ValueError, match=r"tensor of shape \(2, 3\) that requires grad"):
        dpp.attach(func, torch.zeros(2, 3, dtype=torch.float64), SPEC)


def test_what_is_only_looked_at_gets_no_gradient():
    problem, other = make_equilibrium([(3, 4)]), torch.nn.Linear(4, 4)

    def func(h):
        with torch.no_grad():
            scale = other.weight.norm() * 0  # as a power iteration would use it
        return problem.func(h) + scale if other.bias.shape == (4,) else h

    problem.probe(dpp.attach(func, problem.state, SPEC)).backward()
    assert other.weight.grad is None
    assert other.bias.grad is None
    assert problem.params[0].grad is not None


def test_a_gradient_penalty_trains():
    """The norm of dL/dx as a loss, as in a WGAN-GP, falls under its own gradient."""
    torch.manual_seed(0)
    block = Block().double()
    x = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam(block.parameters(), 0.02)
    penalties = []
    for _ in range(20):
        h = solved(lambda h: block(h, x), x, "ift(tol=1e-8, higher_order=True)")
        (slope,) = torch.autograd.grad(h.sum(), x, create_graph=True)
        penalty = (slope.norm(dim=1) - 1).square().mean()
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
        penalties.append(penalty.item())
    assert penalties[-1] < 0.7 * penalties[0]


def test_maml():
    """The meta-gradient through a step of the inner optimiser."""
    torch.manual_seed(0)
    weight = (0.2 * torch.randn(5, 5, dtype=torch.float64)).requires_grad_()
    x, y, x2, y2 = torch.randn(4, 3, 5, dtype=torch.float64)

    def meta(make):
        def loss(w, x, y):
            h = make(lambda h: torch.tanh(h @ w.mT + x), x)
            return (h - y).square().mean()

        (grad,) = torch.autograd.grad(loss(weight, x, y), weight, create_graph=True)
        return torch.autograd.grad(loss(weight - 0.5 * grad, x2, y2), weight)[0]

    got, want = meta(solved), meta(unrolled)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    # Not a first-order approximation in disguise.
    first_order = torch.autograd.grad(
        (unrolled(lambda h: torch.tanh(h @ weight.mT + x2), x2) - y2).square().mean(), weight
    )[0]
    assert (got - first_order).norm() > 1e-3 * got.norm()


@pytest.mark.filterwarnings("ignore:h is no equilibrium")
def test_under_autocast_f_sees_the_callers_in_every_order():
    torch.manual_seed(0)
    linear = torch.nn.Linear(8, 8)
    seen = []

    def func(h):
        out = linear(h)
        seen.append(out.dtype)
        return torch.tanh(0.3 * out)

    with torch.autocast("cpu", torch.bfloat16):
        h = dpp.attach(func, torch.zeros(2, 8), "ift(tol=1e-3, higher_order=True)")
    grads = torch.autograd.grad(h.sum(), list(linear.parameters()), create_graph=True)
    torch.autograd.grad(sum(g.square().sum() for g in grads), linear.weight)
    assert len(seen) > 3
    assert set(seen) == {torch.bfloat16}


def test_inside_a_checkpoint():
    problem = make_equilibrium([(3, 4)], norm=0.5)
    weight, inject = problem.params

    def model(inject):
        return solved(lambda h: torch.tanh(h @ weight.mT + inject), inject)

    plain = derivatives(problem.probe(model(inject)), problem.params, 1)
    within = derivatives(
        problem.probe(checkpoint(model, inject, use_reentrant=False)), problem.params, 1
    )
    torch.testing.assert_close(within, plain)


def test_a_parameter_changed_since_the_forward_pass_is_an_error():
    problem = make_equilibrium([(3, 4)])
    loss = problem.probe(dpp.attach(problem.func, problem.state, SPEC))
    with torch.no_grad():
        problem.params[0].mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nothing_is_left_behind():
    problem = make_equilibrium([(3, 4)])
    alive = []

    def func(h):
        out = problem.func(h)
        alive.append(weakref.ref(out))
        return out

    loss = problem.probe(dpp.attach(func, problem.state, SPEC))
    grads = torch.autograd.grad(loss, problem.params, create_graph=True)
    torch.autograd.grad(sum(g.square().sum() for g in grads), problem.params)
    del loss, grads
    gc.collect()
    assert len(alive) > 3
    assert not any(ref() is not None for ref in alive)


def test_frozen_parameters_and_nothing_to_differentiate():
    problem = make_equilibrium([(3, 4)])
    weight, inject = problem.params
    weight.requires_grad_(False)
    h = dpp.attach(problem.func, problem.state, SPEC)
    (got,) = torch.autograd.grad(problem.probe(h), inject)
    want = problem.probe(unrolled(problem.func, problem.state))
    torch.testing.assert_close(got, torch.autograd.grad(want, inject)[0])
    inject.requires_grad_(False)
    assert not dpp.attach(problem.func, problem.state, SPEC).requires_grad


def test_the_others_say_who_can():
    problem = make_equilibrium([(3, 4)])
    loss = problem.probe(dpp.attach(problem.func, problem.state, "ift"))
    with pytest.raises(RuntimeError, match=r"ift\(higher_order=True\) or bptt"):
        torch.autograd.grad(loss, problem.params, create_graph=True)


def test_a_report_measures_how_far_second_derivatives_are_off():
    """That of a phantom gradient is the surrogate's, and far from the true one."""
    problem = make_equilibrium([(3, 8)], norm=0.8)
    grads = [
        "upg(k=5, lam=0.5)",
        "upg(k=60, lam=1.0)",
        "jfb",
        "bptt(steps=200)",
        SPEC,
        "npg",
        "ift",
    ]
    report = dpp.gradient_report(
        problem.func, problem.state, problem.probe, problem.params, grads, second_order=True
    )
    upg, long, jfb, bptt, own, npg, ift = (row.second_order_error for row in report.results)
    assert 0.15 < upg < 0.5
    assert jfb > 0.15
    # With many steps it forgets that the equilibrium is held fixed.
    assert long < 1e-7
    assert bptt < 1e-7
    assert own < 1e-7
    assert npg is None
    assert ift is None
    assert "2nd order" in str(report)
    assert report.to_dict()["results"][0]["second_order_error"] == upg

    # Against a second derivative by hand, of backprop through a long iteration.
    def second(make):
        loss = problem.probe(make())
        generator = torch.Generator().manual_seed(0)
        grads = torch.autograd.grad(loss, problem.params, create_graph=True)
        w = [torch.randn(g.shape, generator=generator, dtype=torch.float64) for g in grads]
        total = sum((g * wi).sum() for g, wi in zip(grads, w, strict=True))
        return torch.cat([g.flatten() for g in torch.autograd.grad(total, problem.params)])

    want = second(lambda: unrolled(problem.func, problem.state))
    got = second(lambda: dpp.attach(problem.func, problem.state, "upg(k=5, lam=0.5)"))
    assert upg == pytest.approx(float((got - want).norm() / want.norm()), rel=1e-6)
    plain = dpp.gradient_report(problem.func, problem.state, problem.probe, problem.params, ["upg"])
    assert plain.results[0].second_order_error is None
    assert "2nd order" not in str(plain)


def test_leaves_of_the_result_are_like_the_state():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 3, 3, padding=1).to(memory_format=torch.channels_last)
    state = torch.zeros(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    h = solved(lambda h: torch.tanh(0.3 * conv(h)), state, "ift(higher_order=True)")
    for leaf in tree_leaves(h):
        assert leaf.is_contiguous(memory_format=torch.channels_last)
