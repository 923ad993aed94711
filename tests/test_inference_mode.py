"""Derivatives in `torch.inference_mode`, where autograd records nothing: refused, never zero."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deq_phantom_plugin as dpp
from deq_phantom_plugin.diagnostics import ascent_condition, measured_inner_product

WEIGHT = torch.tensor(
    [[0.6, 0.3, 0.0], [-0.2, 0.5, 0.1], [0.0, 0.2, -0.4]], dtype=torch.float64, requires_grad=True
)
X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)


def func(h):
    return torch.tanh(h @ WEIGHT.mT + X)


def solved():
    h = torch.zeros_like(X)
    with torch.no_grad():
        for _ in range(200):
            h = func(h)
    return h


def dense(h):
    """The Jacobian of `func`, by plain autograd, shape (12, 12)."""
    return torch.autograd.functional.jacobian(func, h).reshape(12, 12)


def radii(h):
    """The spectral radius of each sample's own block."""
    blocks = dense(h).reshape(4, 3, 4, 3)
    return torch.stack([torch.linalg.eigvals(blocks[i, :, i]).abs().max() for i in range(4)])


class Model(nn.Module):
    def __init__(self, grad="ift", grad_in_eval=False):
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=torch.float64)
        with torch.no_grad():
            self.linear.weight.copy_(WEIGHT)
        self.equilibrium = dpp.Equilibrium(
            grad=grad, tol=1e-10, max_iter=300, grad_in_eval=grad_in_eval
        )

    def forward(self, x):
        return self.equilibrium(lambda h: torch.tanh(self.linear(h) + x), torch.zeros_like(x))


def loss(state):
    return state.square().sum()


MEASUREMENTS = {
    "dpp.spectral_radius": lambda h: dpp.spectral_radius(func, h),
    "dpp.jacobian_reg": lambda h: dpp.jacobian_reg(func, h),
    "dpp.gradient_report": lambda h: dpp.gradient_report(func, h, loss, [WEIGHT], ["jfb"]),
    "dpp.model_report": lambda h: dpp.model_report(Model(), X, loss, ["jfb"]),
    "dpp.tune": lambda h: dpp.tune(Model(), [X], loss),
    "ascent_condition": lambda h: ascent_condition(func, h, [WEIGHT], "jfb", h),
    "measured_inner_product": lambda h: measured_inner_product(func, h, [WEIGHT], "jfb", h),
    "JacobianRegularization": lambda h: dpp.JacobianRegularization(weight=1.0)(func, h),
}


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("name", MEASUREMENTS)
def test_it_is_refused_and_says_what_to_do(name, enabled):
    h = solved()
    with (
        torch.inference_mode(),
        torch.set_grad_enabled(enabled),
        pytest.raises(
            RuntimeError, match=r"torch\.inference_mode, .*torch\.no_grad.*inference_mode\(False\)"
        ),
    ):
        MEASUREMENTS[name](h)


@pytest.mark.parametrize("grad", ["ift", "exact", "npg(lam='adaptive')"])
def test_a_strategy_that_linearises_is_refused_where_a_gradient_is_asked_for(grad):
    """With J = 0 it would choose, and remember, what is wrong in training."""
    with (
        torch.inference_mode(),
        torch.enable_grad(),
        pytest.raises(RuntimeError, match="takes derivatives, and this is torch"),
    ):
        dpp.attach(func, solved(), grad, dpp.Context(batch_dim=0))


@pytest.mark.parametrize("name", ["dpp.spectral_radius", "dpp.jacobian_reg"])
def test_compiled_code_refuses_it_as_well(name):
    h = solved()
    compiled = torch.compile(MEASUREMENTS[name], backend="eager")
    with torch.no_grad():
        torch.manual_seed(5)
        expected = of_probe(h) if name == "dpp.jacobian_reg" else radii(h)
        torch.manual_seed(5)
        torch.testing.assert_close(compiled(h), expected, rtol=1e-3, atol=0)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="takes derivatives"):
        compiled(h)


def of_probe(h):
    """||J^T e||^2 / numel by the dense Jacobian, for the e that `jacobian_reg` draws."""
    torch.manual_seed(5)
    e = torch.randn_like(h).flatten()
    torch.manual_seed(5)
    return (dense(h).mT @ e).square().sum() / h.numel()


def test_both_ways_that_the_error_names_are_right():
    h = solved()
    expected, radius = of_probe(h), radii(h)
    with torch.no_grad():
        torch.testing.assert_close(dpp.jacobian_reg(func, h), expected)
        torch.testing.assert_close(dpp.spectral_radius(func, h, tol=1e-8), radius)
    with torch.inference_mode():
        inside = h + 0
        assert inside.is_inference()
        with torch.inference_mode(False):
            torch.manual_seed(5)
            torch.testing.assert_close(dpp.jacobian_reg(func, inside.clone()).detach(), expected)
            found = dpp.spectral_radius(func, inside.clone(), tol=1e-8)
            torch.testing.assert_close(found, radius)
            report = dpp.gradient_report(func, inside.clone(), loss, [WEIGHT], ["exact"], repeats=1)
            assert report.results[0].cosine > 1 - 1e-8


def test_a_state_that_was_made_in_inference_mode_is_taken_outside_of_it():
    """As `dpp.attach` takes it."""
    h = solved()
    expected, radius = of_probe(h), radii(h)
    with torch.inference_mode():
        inside = h + 0
    assert inside.is_inference()
    torch.testing.assert_close(dpp.jacobian_reg(func, inside).detach(), expected)
    torch.testing.assert_close(dpp.spectral_radius(func, inside, tol=1e-8), radius)
    nested = {"a": inside}
    found = dpp.spectral_radius(lambda h: {"a": func(h["a"])}, nested, tol=1e-8)
    torch.testing.assert_close(found, radius)
    assert nested["a"] is inside  # the caller's own state

    v = 2 * h.flatten()  # dL/dh
    g = torch.linalg.solve(torch.eye(12, dtype=torch.float64) - dense(h).mT, v)
    slope = g.reshape(4, 3) * (1 - func(h).square())
    exact = (slope.mT @ h).detach().flatten()  # dL/dW of h = tanh(W h + x)
    one_step = ((v.reshape(4, 3) * (1 - func(h).square())).mT @ h).detach().flatten()
    cosine = float(torch.cosine_similarity(one_step, exact, dim=0))
    report = dpp.gradient_report(func, inside, loss, [WEIGHT], ["jfb"], repeats=1)
    assert report.results[0].cosine == pytest.approx(cosine, abs=1e-6)
    measured = measured_inner_product(func, inside, [WEIGHT], "jfb", 2 * inside)
    assert measured.inner_product == pytest.approx(float(one_step @ exact), rel=1e-6)
    condition = ascent_condition(func, inside, [WEIGHT], "jfb", 2 * inside)
    assert condition.inner_product == pytest.approx(float(one_step @ exact), rel=1e-6)


@pytest.mark.parametrize("grad", ["ift", "exact", "upg", "npg(lam='adaptive')", "auto"])
@pytest.mark.parametrize("training", [False, True])
def test_forward_solves_go_on(grad, training):
    h = solved()
    model = Model(grad, grad_in_eval=True).train(training)
    with torch.no_grad():
        model.linear.bias.zero_()
    with torch.inference_mode():
        torch.testing.assert_close(model(X), h)
        assert dpp.attach(func, h, grad) is h
