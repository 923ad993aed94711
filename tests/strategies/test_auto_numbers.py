"""What `auto` tells of itself is so: costs, cosines and residuals in the cases that are no rule."""

from __future__ import annotations

import warnings

import pytest
import torch
from test_auto import SPECTRA, Linear, cost, spectrum
from torch import nn

import deq_phantom_plugin as dpp
from deq_phantom_plugin.strategies import auto as module


@pytest.fixture
def judged(monkeypatch):
    """What the last measurement found of each method, by its spec."""
    found = {}
    real = module.shared

    def kept(own, device):
        result = real(own, device)
        found.clear()
        found.update({c.spec: c for c in result.candidates})
        return result

    monkeypatch.setattr(module, "shared", kept)
    return found


HARD = spectrum(torch.linspace(-0.9995, 0.9995, 150).tolist(), samples=3)


@pytest.mark.filterwarnings("ignore:ift.*the adjoint solve stopped after 50")
def test_a_solve_that_stops_short_is_judged_as_it_stops(judged):
    model = Linear(HARD)
    model.at(0)
    counted, cosine = cost("ift", model)
    assert judged["ift"].cosine == pytest.approx(cosine, abs=1e-3)
    assert judged["ift"].cost == counted == 103
    assert judged["ift(tol=0.001)"].cosine == -1  # it would warn in each step


@pytest.mark.filterwarnings("ignore:auto.*no method has a cosine")
def test_where_none_is_good_enough_the_cosine_of_what_acts_is_told():
    model = Linear(HARD, "auto(cosine=1.0)")
    model.at(0)
    assert model.chosen.spec == "ift"
    assert 0.99 < model.chosen.cosine <= 1


@pytest.mark.filterwarnings("ignore:(ift.*the adjoint solve stopped|auto.*not solved)")
def test_a_measurement_has_a_limit():
    """Of a rotation, whose eigenvalues lie all around zero, no solve comes near the end."""
    generator = torch.Generator().manual_seed(0)
    rotations = torch.randn(2, 240, 240, generator=generator, dtype=torch.float64)
    model = Linear(0.999 * torch.linalg.qr(rotations).Q)
    model.at(0)
    assert (model.evaluations, model.products) == (1, 101)
    assert model.chosen.spec == "ift"
    assert model.chosen.cosine is None


@pytest.mark.parametrize("size", [10, 11, 12, 13])
def test_solves_are_counted_as_they_are_in_any_space(judged, size):
    """One of more than ten vectors measures rounding, if it could take two more."""
    model = Linear(spectrum(torch.linspace(-0.95, 0.95, size).tolist()))
    model.at(0)
    for spec in ("ift(tol=0.5)", "ift(tol=0.02)", "ift(tol=0.001)", "ift"):
        assert judged[spec].cost == cost(spec, model)[0], spec


@pytest.mark.filterwarnings("ignore:auto.*not at its equilibrium")
def test_away_from_the_equilibrium_the_cost_is_told_and_the_residual_of_what_was_given():
    model, told = Linear(SPECTRA["0.5"]), []
    state = model.solved(model.inject.detach()) + 5
    dpp.set_step(model, 0)
    context = dpp.Context(batch_dim=0, memory=model.memory, monitor=told.append)
    assert torch.equal(model.gradient(state=state, context=context), model.v)
    torch.testing.assert_close(told[0].residual, residual(model, model.v))
    assert model.chosen.cost == cost(model.chosen.spec, model)[0] == 15


def residual(model, g):
    """||v - (I - J^T) g|| / ||v|| of each sample."""
    left = model.v - g + (model.matrix.mT @ g[..., None]).squeeze(-1)
    return left.norm(dim=1) / model.v.norm(dim=1)


def test_the_residual_of_samples_that_are_off_is_that_of_one_step():
    model, told = Linear(spectrum([0.5, 0.2, -0.4], samples=20)), []
    state = model.solved(model.inject.detach())
    state[3] += 5
    dpp.set_step(model, 0)
    context = dpp.Context(batch_dim=0, memory=model.memory, monitor=told.append)
    g = model.gradient(state=state, context=context)
    torch.testing.assert_close(told[0].residual, residual(model, g), rtol=1e-6, atol=1e-9)
    assert told[0].residual[3] > 0.1


# --- sixteen bits ---------------------------------------------------------------------------------


class Half(nn.Module):
    """An equilibrium whose F computes in bfloat16."""

    def __init__(self, grad="auto"):
        super().__init__()
        self.inner = nn.Linear(24, 24)
        nn.init.orthogonal_(self.inner.weight, 0.9)
        self.to(torch.bfloat16)
        self.grad, self.memory, self.told = dpp.get_strategy(grad), dpp.Memory(), []

    def func(self, h):
        return torch.tanh(self.inner(h)) + self.x

    def step(self, spec=None):
        generator = torch.Generator().manual_seed(1)
        self.x, v = (0.3 * torch.randn(8, 24, generator=generator).bfloat16() for _ in range(2))
        h = torch.zeros_like(self.x)
        with torch.no_grad():
            for _ in range(200):
                h = 0.5 * h + 0.5 * self.func(h)
        memory = self.memory if spec is None else None
        context = dpp.Context(batch_dim=0, step=0, memory=memory, monitor=self.told.append)
        probe = torch.zeros_like(h, requires_grad=True)
        attached = dpp.attach(
            lambda h: self.func(h) + probe, h, self.grad if spec is None else spec, context
        )
        (g,) = torch.autograd.grad(attached, probe, v)
        graph = h.requires_grad_()
        (image,) = torch.autograd.grad(self.func(graph), graph, g)
        left = v.double() - g.double() + image.double()
        return left.norm(dim=1) / v.double().norm(dim=1)


def test_in_16_bits_the_residual_is_that_of_the_sum_and_nothing_is_said():
    """What a correction leaves of its own system is far below what rounding leaves of both."""
    model = Half()
    true = model.step()  # with no warning, which would be an error here
    told = model.told[-1].residual
    assert true.max() > 3e-3
    assert told.max() > 0.3 * true.max()
    assert dpp.report_choice(model)[-1].cosine >= 0.95


def test_in_16_bits_no_solve_is_taken_for_cheaper_than_it_is(judged):
    """Below the rounding of F a solve begins again and again."""
    model = Half()
    model.step()
    for tol in (0.1, 0.05, 0.02, 0.01, 1e-3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", dpp.ConvergenceWarning)
            model.step(f"ift(tol={tol})")
        assert judged[f"ift(tol={tol})"].products >= model.told[-1].n_vjp + 1 - 2, tol


# --- a user's methods -----------------------------------------------------------------------------


def made(k):
    def method(func, equilibrium, context):
        return dpp.get_strategy(f"npg(k={k}, lam=1.0)").attach(func, equilibrium, context)

    return method


def test_methods_that_are_called_alike_are_refused():
    """The one that was chosen is known by its name: another one would act."""
    with pytest.raises(ValueError, match=r"two are called made.<locals>.method"):
        dpp.Auto(methods=[made(1), made(30)])
    one = made(3)
    assert len(dpp.Auto(methods=[one, one, "jfb", "jfb"]).strategies) == 4


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_gradients_of_any_size_are_compared(judged, size):
    model = Linear(SPECTRA["0.5"], "auto(methods=['jfb', 'npg(k=3, lam=1.0)'])")
    model.at(0, v=size * model.v)
    for spec, candidate in judged.items():
        assert candidate.cosine == pytest.approx(cost(spec, model)[1], abs=1e-4)


# --- what is kept and said ------------------------------------------------------------------------

GOOD = {"step": 0, "spec": "jfb", "cosine": 0.99, "cost": 3.0, "why": "the cheapest"}


@pytest.mark.parametrize(
    "kept",
    [
        5,
        {},
        {"of": "auto", "measured": 0, "choices": []},
        {"of": 3, "measured": 0, "choices": [GOOD]},
        {"of": "auto", "measured": "0", "choices": [GOOD]},
        {"of": "auto", "measured": 7, "choices": [GOOD]},
        {"of": "auto", "measured": 0, "choices": [{**GOOD, "spec": None}]},
        {"of": "auto", "measured": 0, "choices": [{**GOOD, "more": 1}, GOOD]},
        {"of": "auto", "measured": 0, "choices": [{**GOOD, "cosine": "high"}]},
    ],
)
def test_what_is_no_log_of_it_is_refused_and_changes_nothing(kept):
    model = Linear(SPECTRA["0.5"])
    model.at(0)
    before = dpp.report_choice(model)
    with pytest.raises(
        ValueError, match=r"memory\.histories\.auto is .*; expected what auto keeps"
    ):
        dpp.load_memory_state_dict(model, {"memory": {"histories": {"auto": kept}}})
    assert dpp.report_choice(model) == before
    good = {"of": "auto", "measured": 0, "choices": [GOOD]}
    dpp.load_memory_state_dict(model, {"memory": {"histories": {"auto": good}}})
    assert dpp.report_choice(model)[-1].spec == "jfb"


def test_each_kind_of_trouble_is_said_once():
    model = Linear(SPECTRA["0.99"], "auto(methods=['jfb', 'npg(k=2)', 'upg'], every=1)")
    far = model.solved(model.inject.detach()) + 50
    with pytest.warns(dpp.ConvergenceWarning) as seen:
        for step, state in enumerate([None, far, None, far, None]):
            model.at(step, state=state)
    said = [str(warning.message).partition("step ")[2] for warning in seen]
    assert [words[3:].split(" in ")[0] for words in said] == [
        "no method has a cosine of at least 0.95. So upg(k=5, lam=0.5, checkpoint=False) acts from "
        "the next step on. dpp.report_choice(model) shows what acted when. This is said once per "
        "run.",
        "not at its equilibrium",
    ]


def test_samples_without_a_gradient_are_not_off():
    """As those that a guard has given another strategy's."""
    model = Linear(spectrum([0.5, 0.2, -0.4], samples=20))
    state, v = model.solved(model.inject.detach()), model.v.clone()
    state[:5] += 5
    v[:5] = 0
    g = model.at(0, state=state, v=v)
    torch.testing.assert_close(g[5:], model.exact[5:], rtol=1e-3, atol=1e-3)
    assert model.chosen.cosine >= 0.95


def test_of_a_large_batch_some_are_drawn_and_judged(judged):
    """Every third sample of 300 is hard: no rhythm of the batch is taken for all of it."""
    easy, hard = spectrum([0.1, 0.0, -0.1], samples=200), spectrum([0.9, 0.0, -0.9], samples=100)
    order = torch.arange(300).view(3, 100).T.flatten()
    model = Linear(torch.cat([easy, hard])[order])
    model.at(0)
    for spec in ("jfb", "npg(k=5, lam=1.0)", "ift(tol=0.1)"):
        counted, cosine = cost(spec, model)
        assert judged[spec].cosine == pytest.approx(cosine, abs=0.1), spec
        assert judged[spec].cost == counted
