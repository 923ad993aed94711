"""Arguments that grow along training, and fractions of training."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import deq_phantom_plugin as dpp
from deq_phantom_plugin.contract.strategy import GradStrategy


def at(spec, step, total=None):
    return dpp.get_strategy(spec).resolve(dpp.Context(step=step, total=total))


def test_each_whole_number_is_held_equally_long():
    ramp = "ramp('tbptt', {'k': (2, 5)}, until=12)"
    assert [at(ramp, step).k for step in range(15)] == [2] * 4 + [3] * 4 + [4] * 4 + [5] * 3
    down = "ramp('npg', {'k': (5, 2)}, until=12)"
    assert [at(down, step).k for step in range(15)] == [5] * 4 + [4] * 4 + [3] * 4 + [2] * 3


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 60), st.sampled_from([0.1, 0.25, 0.5]))
def test_it_is_the_warm_up_of_hrm_text(first, last, tens, ratio):
    """bp_steps = bp_min_steps + int(progress * (bp_max_steps - bp_min_steps)), in HRM-Text."""
    total = 20 * tens
    ramp = f"ramp('tbptt', {{'k': ({first}, {last})}}, until={ratio})"
    for step in range(0, total, 7):
        # As fractions: where theirs is a whole number, floats may miss it by their last digit.
        done = min(step, int(total * ratio)) * abs(last - first) // int(total * ratio)
        assert at(ramp, step, total).k == (first + done if last >= first else first - done)


def test_other_numbers_grow_in_a_line():
    ramp = "ramp('upg', {'k': (2, 6), 'lam': (0.2, 1.0)}, until=8)"
    for step in range(12):
        acting, progress = at(ramp, step), min(1.0, step / 8)
        assert acting.k == 2 + int(4 * progress)
        assert acting.lam == pytest.approx(0.2 + 0.8 * progress, rel=1e-12)
    assert at(ramp, 8).lam == 1.0
    mixed = at("ramp('upg', {'lam': (1, 0.5)}, until=2)", 1)
    assert mixed.lam == 0.75


@given(st.floats(0.01, 1.0), st.floats(0.01, 1.0), st.integers(1, 2**53), st.integers(0, 2**53))
def test_it_stays_between_its_ends_and_reaches_the_last(first, last, end, step):
    ramp = dpp.Ramp("upg", {"lam": (first, last)}, until=end)
    lam = ramp.resolve(dpp.Context(step=step)).lam
    assert min(first, last) <= lam <= max(first, last)
    assert ramp.resolve(dpp.Context(step=end)).lam == last
    assert ramp.resolve(dpp.Context(step=0)).lam == first


@pytest.mark.parametrize("total", [1, 3, 10, 30, 100, 1000, 12_345])
@pytest.mark.parametrize("hundredths", [1, 7, 14, 28, 29, 55, 57, 58, 99])
def test_a_fraction_is_a_whole_step(total, hundredths):
    """The first step of which at least so much is over: 0.07 of 100 is 7, not 8."""
    start = -(-hundredths * total // 100)
    schedule = f"schedule({{0: 'jfb', {hundredths / 100}: 'upg'}})"
    names = [at(schedule, step, total).name for step in (start - 1, start) if step >= 0]
    assert names[-2:] == ["jfb", "upg"][-len(names) :]


class Net(nn.Module):
    def __init__(self, grad, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 3).double()
        self.first, self.second = (dpp.Equilibrium(grad=grad, **settings) for _ in range(2))

    def forward(self, x):
        func = lambda h: torch.tanh(0.5 * self.layer(h) + x)  # noqa: E731
        return self.second(func, self.first(func, torch.zeros_like(x)))


def seen(model):
    """The strategies that acted."""
    found = []
    for equilibrium in (model.first, model.second):
        equilibrium.observers[:] = [(lambda solve: found.append(solve.strategy),)]
    model(torch.ones(2, 3, dtype=torch.float64))
    return found


def test_fractions_of_training():
    model = Net("ramp('tbptt', {'k': (2, 5)}, until=0.2)", steps=9)
    dpp.set_step(model, 0, total=100)
    assert [s.k for s in seen(model)] == [2, 2]
    dpp.set_step(model, 20)  # the length is kept
    assert [s.k for s in seen(model)] == [5, 5]
    dpp.set_step(model, 20, total=200)  # until another is told: a run that goes on for longer
    assert [s.k for s in seen(model)] == [3, 3]
    dpp.set_grad(model, "schedule({0: 'jfb', 0.5: 'upg(k=2)'})")
    dpp.set_step(model, 99)
    assert {s.name for s in seen(model)} == {"jfb"}
    dpp.set_step(model, 100)
    assert {s.name for s in seen(model)} == {"upg"}
    mixed = "schedule({0: 'jfb', 0.5: 'upg', 70: 'npg'})"
    names = [at(mixed, s, 100).name for s in (0, 49, 50, 69, 70)]
    assert names == ["jfb", "jfb", "upg", "upg", "npg"]


def test_a_length_is_told_again_after_a_resume():
    model, twin = (Net("ramp('tbptt', {'k': (2, 5)}, until=0.2)", steps=9) for _ in range(2))
    dpp.set_step(model, 10, total=100)
    twin.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match=r"fraction of training.*total="):
        twin(torch.ones(2, 3, dtype=torch.float64))
    dpp.set_step(twin, 10, total=100)
    assert seen(twin) == seen(model)


def test_a_step_beyond_the_length_is_said():
    model = Net("ramp('tbptt', {'k': (2, 5)}, until=0.5)", steps=9)
    dpp.set_step(model, 10, total=10)  # as after the last step
    with pytest.warns(dpp.AssumptionWarning, match=r"step=11 is beyond total=10"):
        dpp.set_step(model, 11)
    assert [s.k for s in seen(model)] == [5, 5]


@pytest.mark.parametrize("outer", ["schedule({{0: {0!r}}})", "guard({0!r})", "{0}"])
@pytest.mark.parametrize(
    ("inner", "ends"),
    [
        ("ramp('tbptt', {'k': (1, 3)}, until=4)", ("tbptt(k=1)", "tbptt(k=3)")),
        ("ramp(\"guard('npg')\", {'forward_tol': (0.5, 0.1)}, until=4)",
         ("guard('npg', forward_tol=0.5)", "guard('npg')")),
        ("ramp('bptt', {'steps': (2, 4)}, until=4)", ("bptt(2)", "bptt(4)")),
        ("ramp('reversible', {'steps': (2, 4), 'beta': (0.5, 0.6)}, until=4)",
         ("reversible(2, 0.5)", "reversible(4, 0.6)")),
        ("ramp('shine', {'refine': (0, 3)}, until=4)", ("shine", "shine(3)")),
        ("ramp('ift', {'tol': (1e-2, 1e-6)}, until=4)", ("ift(tol=1e-2)", "ift(tol=1e-6)")),
    ],
)  # fmt: skip
def test_inside_and_around_others_it_is_what_it_resolves_to(outer, inner, ends):
    strategy = dpp.get_strategy(outer.format(inner))
    assert dpp.get_strategy(repr(strategy)) == strategy
    ramp = dpp.get_strategy(inner)
    for step, end in zip((0, 4), ends, strict=True):
        acting, wanted = strategy.resolve(dpp.Context(step=step)), dpp.get_strategy(end)
        if outer.startswith("guard") and not wanted.owns_solve:
            wanted = dpp.Guard(wanted)
        assert acting == wanted
        for name in ("steps_ahead", "owns_solve", "hands_out_states"):
            assert getattr(acting, name) == getattr(wanted, name)
        plain = ramp.resolve(dpp.Context(step=step))
        for name in (
            "owns_solve",
            "wants_inverse_jacobian",
            "accepts_nonfinite",
            "tells_samples_apart",
            "assumes_equilibrium",
            "hands_out_states",
        ):
            assert getattr(ramp, name) == getattr(plain, name)
        assert acting.within(2) == wanted.within(2)


@pytest.mark.parametrize("outer", ["ramp({0!r}, {{'forward_tol': (0.5, 0.1)}}, until=4)",
                                   "schedule({{0: {0!r}}})"])  # fmt: skip
def test_a_guard_inside_takes_a_state_that_is_not_finite(outer):
    """The check of the state is that of the strategy that acts."""
    guard = "guard('npg', on_failure=\"fallback('upg(k=9, lam=1.0)')\", forward_tol=0.5)"
    layer = nn.Linear(3, 3).double()
    func = lambda h: torch.tanh(0.5 * layer(h))  # noqa: E731
    lost = torch.full((2, 3), math.nan, dtype=torch.float64)
    found = []
    for spec in (guard, outer.format(guard)):
        context = dpp.Context(step=0, batch_dim=0)
        with pytest.warns(dpp.ConvergenceWarning, match="forward solve"):
            found.append(dpp.attach(func, lost, spec, context))
    assert found[0].isfinite().all()
    assert torch.equal(*found)


def test_the_gradient_of_each_step():
    layer, x = nn.Linear(3, 3).double(), torch.randn(2, 3, dtype=torch.float64)
    for step, k in ((0, 1), (2, 2), (4, 3), (9, 3)):
        h = torch.zeros_like(x)
        for i in range(6):
            h = torch.tanh(layer(h.detach() if i < 6 - k + 1 else h) + x)
        wanted = torch.autograd.grad(h.sum(), layer.weight)[0]
        spec = "ramp('tbptt', {'k': (1, 3)}, until=4)"
        func = lambda h: torch.tanh(layer(h) + x)  # noqa: E731
        out = dpp.loop(func, torch.zeros_like(x), 6, spec, dpp.Context(step=step))
        assert torch.equal(torch.autograd.grad(out.sum(), layer.weight)[0], wanted)


@pytest.mark.parametrize(
    "spec", ["ramp('tbptt', {'k': (2, 5)}, until=0.2)", "schedule({0: 'jfb', 0.5: 'upg'})"]
)
def test_a_fraction_without_a_length_is_refused(spec):
    with pytest.raises(ValueError, match=r"fraction of training.*total="):
        at(spec, 1)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ramp('tbptt', {'k': ('a', 5)})", "two numbers"),
        ("ramp('tbptt', {'k': (True, 5)})", "two numbers"),
        ("ramp('tbptt', {'k': (1, 1e999)})", "two numbers"),
        ("ramp('tbptt', {'k': (1, 2, 3)})", "two numbers"),
        ("ramp('tbptt', {'k': '25'})", "two numbers"),
        ("ramp('tbptt', {'k': {2, 5}})", "two numbers"),
        ("ramp('tbptt', {'k': 5})", "two numbers"),
        ("ramp('tbptt', {'k': ('uniform(1, 2)', 5)})", "two numbers"),
        ("ramp('tbptt', 5)", "expected a dict"),
        ("ramp('tbptt', {1: (2, 5), 'k': (1, 2)})", "expected a dict"),
        ("ramp('tbptt', {})", "has none"),
        ("ramp('tbptt', {'q': (2, 5)})", "no argument 'q'"),
        ("ramp(\"guard('upg')\", {'_policy': (2, 5)})", "no argument '_policy'"),
        ("ramp('upg', {'lam': (0.5, 2.0)})", r"lam=2\.0"),
        ("ramp('tbptt', {'k': (0, 5)})", "k=0"),
        ("ramp('tbptt', {'k': (1, 5.0)})", r"k=5\.0"),
        ("ramp('tbptt', {'k': (1, 5.5)})", r"k=5\.5"),
        ("ramp(\"tbptt('all')\", {'k': (2, 5)})", "is no number"),
        ("ramp(\"tbptt('poisson(3)')\", {'k': (2, 5)})", "is no number"),
        ("ramp(\"upg(lam='adaptive')\", {'lam': (0.2, 0.5)})", "is no number"),
        ("ramp('upg', {'checkpoint': (0, 1)})", "is no number"),
        ("ramp('tbptt', {'k': (2, 5)}, until=0)", "until=0"),
        ("ramp('tbptt', {'k': (2, 5)}, until=-3)", "until=-3"),
        ("ramp('tbptt', {'k': (2, 5)}, until=0.0)", r"until=0\.0"),
        ("ramp('tbptt', {'k': (2, 5)}, until=-0.5)", r"until=-0\.5"),
        ("ramp('tbptt', {'k': (2, 5)}, until=1.5)", r"until=1\.5"),
        ("ramp('tbptt', {'k': (2, 5)}, until=True)", "until=True"),
        ("ramp('tbptt', {'k': (2, 5)}, until=None)", "until=None"),
        ("ramp('tbptt', {'k': (2, 5)}, until='0.2')", "until='0.2'"),
        ("ramp('tbptt')", "arguments"),
        ("schedule({0: 'jfb', 1.5: 'upg'})", r"step 1\.5"),
        ("schedule({0: 'jfb', 1.0: 'upg'})", r"step 1\.0"),
        ("schedule({0: 'jfb', -0.5: 'upg'})", r"step -0\.5"),
        ("schedule({0.5: 'upg'})", "step 0"),
    ],
)
def test_bad_ramps(spec, message):
    with pytest.raises(ValueError, match=message):
        dpp.get_strategy(spec)


class Plain(GradStrategy):
    def attach(self, func, equilibrium, context):
        return func(equilibrium)


def test_a_strategy_without_arguments_cannot_grow():
    with pytest.raises(ValueError, match=r"Plain\(\) is no dataclass"):
        dpp.Ramp(Plain(), {"k": (1, 2)})


@pytest.mark.parametrize("total", [0, -1, 2.5, True, "9"])
def test_a_bad_length(total):
    with pytest.raises(ValueError, match="total="):
        dpp.set_step(Net("upg"), 0, total=total)
