"""Numbers of evaluations that are drawn, and arguments that grow."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import subprocess
import sys
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import deq_phantom_plugin as dpp
from deq_phantom_plugin.strategies.depth import Depth, number_or_depth

STEPS = 4000


def draws(text, steps=STEPS, place=0):
    depth, memory, found = number_or_depth("k", text), dpp.Memory(), []
    for step in range(steps):
        memory.tell(step, None, place)
        found.append(depth.draw(dpp.Context(memory=memory)))
    return found


def poisson(n, mean):
    return math.exp(n * math.log(mean) - mean - math.lgamma(n + 1))


def lognormal_poisson(n, mean, sigma, cells=4000):
    """P(1 + Poisson(r) = n), the integral over r by the midpoint rule in log r."""
    if n < 1:
        return 0.0
    total, span = 0.0, 16 * sigma
    for cell in range(cells):
        x = -8 * sigma + (cell + 0.5) * span / cells
        density = math.exp(-((x / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))
        total += density * poisson(n - 1, mean * math.exp(x - sigma**2 / 2))
    return total * span / cells


@pytest.mark.parametrize(
    ("text", "probability"),
    [
        ("uniform(1, 6)", lambda n: 1 / 6 if 1 <= n <= 6 else 0.0),
        ("poisson(2)", lambda n: poisson(0, 2) + poisson(1, 2) if n == 1 else poisson(n, 2)),
        ("poisson(8, seed=3)", lambda n: sum(poisson(m, 8) for m in ({0, 1} if n == 1 else {n}))),
        ("lognormal_poisson(mean=8, sigma=0.5)", lambda n: lognormal_poisson(n, 8, 0.5)),
    ],
)
def test_the_stated_distribution(text, probability):
    counts = Counter(draws(text))
    assert min(counts) >= 1
    # Each count within five deviations of its own mean: a wrong distribution is off by far more.
    for n in range(1, max(counts) + 1):
        p = probability(n)
        assert abs(counts[n] - STEPS * p) <= 5 * math.sqrt(STEPS * p * (1 - p)) + 1, (n, counts[n])
    # What comes next does not depend on what came: pairs of the two halves are independent.
    found = draws(text)
    middle = sorted(found)[STEPS // 2]
    above = [n > middle for n in found]
    share = sum(above) / STEPS
    both = sum(a and b for a, b in itertools.pairwise(above))
    assert abs(both - (STEPS - 1) * share**2) <= 5 * math.sqrt(STEPS * share**2 * (1 - share**2))


def test_a_large_mean():
    found = torch.tensor(draws("poisson(2000)"), dtype=torch.float64)
    assert abs(found.mean() - 2000) < 5 * math.sqrt(2000 / STEPS)
    assert abs(found.var() / 2000 - 1) < 5 * math.sqrt(2 / STEPS)


def test_what_a_draw_depends_on():
    text = "uniform(1, 1000000)"
    assert draws(text, 50) == draws(text, 50)  # as after a resume
    assert draws(text, 50) != draws(text, 50, place=1)
    assert draws(text, 50) != draws("uniform(1, 1000000, seed=1)", 50)
    assert len(set(draws(text, 50))) > 45
    code = (
        "import deq_phantom_plugin as dpp\n"
        "from deq_phantom_plugin.strategies.depth import number_or_depth\n"
        f"depth = number_or_depth('k', {text!r})\n"
        "print([depth.draw(dpp.Context(step=step)) for step in range(50)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(draws(text, 50))  # another process, another hash seed


class Net(nn.Module):
    def __init__(self, grad, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 3).double()
        self.first, self.second = (dpp.Equilibrium(grad=grad, **settings) for _ in range(2))
        self.x = torch.randn(2, 3, dtype=torch.float64)

    def forward(self, calls=1):
        func = lambda h: torch.tanh(0.5 * self.layer(h) + self.x)  # noqa: E731
        h = torch.zeros_like(self.x)
        for _ in range(calls):
            h = self.first(func, h.detach())
        return self.second(func, h)


def seen(model, calls=1):
    """The strategies that acted."""
    found = []
    for equilibrium in (model.first, model.second):
        equilibrium.observers.append((lambda solve: found.append(solve.strategy),))
    model(calls)
    model.first.observers.clear()
    model.second.observers.clear()
    return found


@pytest.mark.parametrize("grad", ["tbptt", "upg", "npg", "bptt"])
def test_one_draw_for_a_step_another_for_each_equilibrium(grad):
    name = "steps" if grad == "bptt" else "k"
    model = Net(f"{grad}({name}='uniform(1, 40)')", steps=40)
    a, b = [], []
    for step in range(8):
        dpp.set_step(model, step)
        first, again, second = seen(model, calls=2)
        assert first == again
        assert seen(model)[0] == first  # an accumulated batch
        a.append(getattr(first, name))
        b.append(getattr(second, name))
    assert len(set(a)) > 3
    assert a != b
    twin = Net(f"{grad}({name}='uniform(1, 40)')", steps=40)
    twin.load_state_dict(model.state_dict())
    dpp.set_step(twin, 7)
    assert seen(twin) == seen(model)
    # The gradient is that of the number.
    dpp.set_step(model, 3)
    model(1).sum().backward()
    drawn = [p.grad.clone() for p in model.parameters()]
    fixed = Net(f"{grad}({name}={b[3]})", steps=40)
    fixed.first.grad = f"{grad}({name}={a[3]})"
    fixed(1).sum().backward()
    for got, want in zip(drawn, fixed.parameters(), strict=True):
        assert torch.equal(got, want.grad)


def test_each_call_for_itself():
    model = Net("tbptt(k='uniform(1, 40, per_call=True)')", steps=40)
    dpp.set_step(model, 0)
    found = [strategy.k for strategy in seen(model, calls=6)]
    assert len(set(found)) > 3
    dpp.set_step(model, 1)
    other = [strategy.k for strategy in seen(model, calls=6)]
    assert other != found
    dpp.set_step(model, 0)
    assert [strategy.k for strategy in seen(model, calls=6)] == found


def test_a_loop_of_random_length():
    model = Net("tbptt(k='all')", steps="uniform(1, 40)")
    lengths = []
    for step in range(8):
        dpp.set_step(model, step)
        model()
        lengths.append(int(model.first.last.nfe))
        assert seen(model)[0].k == lengths[-1]
    assert len(set(lengths)) > 3
    model.eval()
    with torch.no_grad():
        model()
    assert int(model.first.last.nfe) == 20  # the mean
    assert Net("bptt", steps="uniform(1, 40)").first.grad == dpp.get_strategy(
        "bptt('uniform(1, 40)')"
    )
    memory, evaluations = dpp.Memory(), []
    memory.tell(5, None, 0)
    context = dpp.Context(memory=memory)

    def func(h):
        evaluations.append(1)
        return torch.tanh(h)

    dpp.loop(func, torch.ones(2, 3), "poisson(8)", "tbptt(k=1)", context)
    assert len(evaluations) == number_or_depth("steps", "poisson(8)").draw(context)
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert again.first.steps == model.first.steps


def test_an_untold_step_is_said():
    with pytest.warns(dpp.ConvergenceWarning, match="not told the training step"):
        Net("upg(k='uniform(1, 3)')", steps=4)()


@pytest.mark.parametrize(
    "text",
    [
        "unifrom(1, 6)",
        "uniform(6, 1)",
        "uniform(0, 1)",
        "uniform(1)",
        "uniform(1.5, 2)",
        "uniform(1, 2, 3)",
        "uniform(1, 2, high=3)",
        "poisson(-1)",
        "poisson(nan)",
        "poisson(1e9)",
        "poisson(8, seed=-1)",
        "poisson(8, per_call=1)",
        "lognormal_poisson(32)",
        "lognormal_poisson(mean=32, sigma=9)",
        "8",
        "",
        "uniform(1, 2",
    ],
)
def test_what_is_no_distribution(text):
    with pytest.raises(ValueError, match=r"k=.*expected a whole number of at least 1, or a distr"):
        dpp.get_strategy({"name": "npg", "k": text})
    with pytest.raises(ValueError, match=r"steps=.*expected a whole number of at least 1, or a d"):
        dpp.loop(torch.tanh, torch.zeros(2), text)


@given(
    st.one_of(
        st.tuples(st.integers(1, 50), st.integers(0, 50)).map(
            lambda ab: Depth("uniform", (ab[0], ab[0] + ab[1]))
        ),
        st.floats(1e-3, 1e4).map(lambda mean: Depth("poisson", (mean,), seed=7, per_call=True)),
        st.tuples(st.floats(1e-3, 1e4), st.floats(1e-3, 3)).map(
            lambda args: Depth("lognormal_poisson", args, per_process=True)
        ),
    ),
    st.integers(0, 2**53),
)
def test_it_parses_back_and_draws_at_least_one(depth, step):
    assert number_or_depth("k", str(depth)) == depth
    strategy = dpp.UPG(k=depth)
    assert dpp.get_strategy(repr(strategy)) == strategy
    assert depth.draw(dpp.Context(step=step)) >= 1
    assert depth.typical >= 1


# ---------------------------------------------------------------------------- ramps


def test_a_ramp_is_linear_and_stays():
    ramp = dpp.get_strategy("ramp('upg', {'k': (2, 6), 'lam': (0.2, 1.0)}, until=8)")
    for step in range(12):
        acting = ramp.resolve(dpp.Context(step=step))
        progress = min(1.0, step / 8)
        assert acting.k == round(2 + 4 * progress)
        assert acting.lam == pytest.approx(0.2 + 0.8 * progress)
    down = dpp.get_strategy("ramp('npg', {'k': (9, 3)}, until=3)")
    assert [down.resolve(dpp.Context(step=s)).k for s in range(5)] == [9, 7, 5, 3, 3]


def test_fractions_of_training():
    model = Net("ramp('tbptt', {'k': (2, 5)}, until=0.2)", steps=9)
    dpp.set_step(model, 0, total=100)
    assert [s.k for s in seen(model)] == [2, 2]
    dpp.set_step(model, 20)  # the length is kept
    assert [s.k for s in seen(model)] == [5, 5]
    dpp.set_grad(model, "schedule({0: 'jfb', 0.5: 'upg(k=2)'})")
    dpp.set_step(model, 49)
    assert {s.name for s in seen(model)} == {"jfb"}
    dpp.set_step(model, 50)
    assert {s.name for s in seen(model)} == {"upg"}
    mixed = dpp.get_strategy("schedule({0: 'jfb', 0.5: 'upg', 70: 'npg'})")
    names = [mixed.resolve(dpp.Context(step=s, total=100)).name for s in (0, 49, 50, 69, 70)]
    assert names == ["jfb", "jfb", "upg", "upg", "npg"]


@pytest.mark.parametrize(
    "spec", ["ramp('tbptt', {'k': (2, 5)}, until=0.2)", "schedule({0: 'jfb', 0.5: 'upg'})"]
)
def test_a_fraction_without_a_length_is_refused(spec):
    with pytest.raises(ValueError, match=r"fraction of training.*total="):
        dpp.get_strategy(spec).resolve(dpp.Context(step=1))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ramp('tbptt', {'k': ('a', 5)})", "two numbers"),
        ("ramp('tbptt', {'k': 5})", "expected a dict"),
        ("ramp('tbptt', {})", "has none"),
        ("ramp('tbptt', {'q': (2, 5)})", "no argument 'q'"),
        ("ramp('upg', {'lam': (0.5, 2.0)})", r"lam=2\.0"),
        ("ramp('tbptt', {'k': (0, 5)})", "k=0"),
        ("ramp(\"tbptt('all')\", {'k': (2, 5)})", "is no number"),
        ("ramp(\"tbptt('poisson(3)')\", {'k': (2, 5)})", "is no number"),
        ("ramp('upg', {'checkpoint': (0, 1)})", "is no number"),
        ("ramp('tbptt', {'k': (2, 5)}, until=0)", "until=0"),
        ("ramp('tbptt', {'k': (2, 5)}, until=1.5)", r"until=1\.5"),
        ("ramp('tbptt', {'k': (2, 5)}, until=True)", "until=True"),
        ("schedule({0: 'jfb', 1.5: 'upg'})", r"step 1\.5"),
    ],
)
def test_bad_ramps(spec, message):
    with pytest.raises(ValueError, match=message):
        dpp.get_strategy(spec)


@pytest.mark.parametrize("total", [0, -1, 2.5, True, "9"])
def test_a_bad_length(total):
    with pytest.raises(ValueError, match="total="):
        dpp.set_step(Net("upg"), 0, total=total)
