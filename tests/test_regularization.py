from __future__ import annotations

import pytest
import torch
from torch import nn

import deq_phantom_plugin as dpp
from conftest import evaluate
from deq_phantom_plugin import JacobianRegularization
from deq_phantom_plugin.testing import make_equilibrium


def problem():
    return make_equilibrium([(3, 4)])


def test_the_published_schedule():
    schedule = JacobianRegularization(weight=2.0, freq=0.4, increment=0.1, interval=30000)
    weights = [schedule.weight_at(step) for step in (0, 29999, 30000, 59999, 60000)]
    assert weights == pytest.approx([2.0, 2.0, 2.1, 2.1, 2.2])
    assert JacobianRegularization(0.5).weight_at(10**6) == 0.5


def test_a_falling_weight_stops_at_zero():
    schedule = JacobianRegularization(weight=0.25, increment=-0.1, interval=10)
    weights = [schedule.weight_at(step) for step in (0, 10, 20, 30, 1000)]
    assert weights == pytest.approx([0.25, 0.15, 0.05, 0.0, 0.0])
    assert schedule(problem().func, problem().state, step=30) is None


def test_a_weight_that_begins_at_zero_grows():
    schedule = JacobianRegularization(increment=0.1, interval=5)
    equilibrium = problem()
    assert schedule(equilibrium.func, equilibrium.state, step=4) is None
    assert schedule(equilibrium.func, equilibrium.state, step=5) > 0


def test_expectation_is_the_frobenius_norm():
    equilibrium = problem()
    jacobian = equilibrium.jacobian()
    expected = 0.3 * jacobian.square().sum() / equilibrium.state.numel()
    schedule = JacobianRegularization(0.3, n_samples=4000)
    found = schedule(equilibrium.func, equilibrium.state)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0)
    (grad,) = torch.autograd.grad(found, equilibrium.params[0])
    assert grad.norm() > 0


def test_frequency_is_a_probability_per_step():
    equilibrium = problem()
    schedule = JacobianRegularization(1.0, freq=0.3)
    drawn = [schedule(equilibrium.func, equilibrium.state) is not None for _ in range(600)]
    assert sum(drawn) / 600 == pytest.approx(0.3, abs=0.06)
    never = JacobianRegularization(1.0, freq=0.0)
    assert all(never(equilibrium.func, equilibrium.state) is None for _ in range(20))


def test_nothing_is_drawn_where_nothing_is_random():
    equilibrium = problem()
    before = torch.get_rng_state()
    assert JacobianRegularization(0.0, freq=0.5)(equilibrium.func, equilibrium.state) is None
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("n_samples", [1, 3])
def test_cost(n_samples, monkeypatch):
    equilibrium = problem()
    evaluations, products = [], []
    original = torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *a, **k: products.append(1) or original(*a, **k)
    )

    def counted(state):
        evaluations.append(1)
        return equilibrium.func(state)

    JacobianRegularization(1.0, n_samples=n_samples)(counted, equilibrium.state)
    assert len(evaluations) <= n_samples
    assert len(products) == n_samples


def test_an_untold_step_warns():
    schedule = JacobianRegularization(0.5, increment=0.1, interval=10)
    with pytest.warns(dpp.AssumptionWarning, match=r"call dpp\.set_step"):
        assert schedule.weight_at(None) == 0.5
    assert JacobianRegularization(0.5).weight_at(None) == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0}, r"weight=-1\.0; expected a finite number of at least 0"),
        ({"weight": float("nan")}, "weight=nan"),
        ({"weight": "2"}, "weight='2'; expected a number"),
        ({"freq": 1.5}, r"freq=1\.5; expected a probability"),
        ({"freq": True}, "freq=True"),
        ({"increment": float("inf")}, "increment=inf"),
        ({"increment": 0.1}, r"increment=0\.1 without an interval"),
        ({"interval": 0}, "interval=0; expected a whole number"),
        ({"n_samples": 0}, "n_samples=0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        JacobianRegularization(**settings)


# --- MDEQ, which uses the same schedule ----------------------------------------------------------


@pytest.fixture
def mdeq():
    pytest.importorskip("torchdeq")
    from deq_phantom_plugin.adapters.mdeq import MDEQ, MDEQConfig

    return MDEQ(MDEQConfig((8, 8), (2, 4), 16, f_max_iter=6, groups=4, expansion=2))


@pytest.mark.filterwarnings("ignore:h is no equilibrium")
@pytest.mark.parametrize("grad", ["upg", "npg", "jfb", "ift(tol=0.1)", "bptt(steps=3)", 2])
def test_mdeq_returns_the_term(mdeq, grad):
    dpp.set_grad(mdeq, grad)
    x = torch.randn(2, 3, 8, 8)
    logits, penalty = mdeq(x, jac_reg=JacobianRegularization(0.5))
    assert logits.shape == (2, 10)
    assert penalty > 0
    nn.functional.cross_entropy(logits, torch.tensor([1, 2])).backward(retain_graph=True)
    weight = mdeq.layer.branches[0][0].reduce.weight_v
    before = weight.grad.clone()
    penalty.backward()
    assert not torch.equal(before, weight.grad)
    assert torch.isfinite(weight.grad).all()


def test_mdeq_knows_the_step(mdeq):
    schedule = JacobianRegularization(0.0, increment=1.0, interval=10)
    x = torch.randn(2, 3, 8, 8)
    dpp.set_step(mdeq, 9)
    assert mdeq(x, jac_reg=schedule)[1] == 0
    dpp.set_step(mdeq, 10)
    assert mdeq(x, jac_reg=schedule)[1] > 0
    assert evaluate(mdeq, x, jac_reg=schedule)[1] == 0
