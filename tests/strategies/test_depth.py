"""Distributions of numbers of evaluations: what is drawn, and what is refused."""

from __future__ import annotations

import bisect
import itertools
import math
import subprocess
import sys
import warnings
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import deq_phantom_plugin as dpp
from deq_phantom_plugin.strategies.depth import Depth, number_or_depth

STEPS = 20_000
WIDE = "uniform(1, 1000000{})"


def draws(text, steps=STEPS, place=0, name="steps"):
    depth, memory, found = number_or_depth("k", text), dpp.Memory(), []
    for step in range(steps):
        memory.tell(step, None, place)
        found.append(depth.draw(dpp.Context(memory=memory), name))
    return found


def poisson(n, mean):
    return math.exp(n * math.log(mean) - mean - math.lgamma(n + 1))


def one_or_more(n, mean):
    return poisson(0, mean) + poisson(1, mean) if n == 1 else poisson(n, mean)


def lognormal_poisson(n, mean, sigma, cells=2000):
    """P(1 + Poisson(r) = n), the integral over r by the midpoint rule in log r."""
    total, span = 0.0, 16 * sigma
    for cell in range(cells):
        x = -8 * sigma + (cell + 0.5) * span / cells
        density = math.exp(-((x / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))
        total += density * poisson(n - 1, mean * math.exp(x - sigma**2 / 2))
    return total * span / cells


def chi_square_bound(freedom, x=14.0):
    """What chi-square exceeds with a chance below e^-x = 8e-7 (Laurent and Massart 2000, (4.3))."""
    return freedom + 2 * math.sqrt(freedom * x) + 2 * x


def cells_of(found, probability, at_least=20.0):
    """Pairs of a count and its mean: of each number, those that are rarer together at the ends."""
    counts, pairs = Counter(found), []
    seen = wanted = left = 0.0
    n = 0
    while left < len(found) - at_least:
        n += 1
        seen, wanted = seen + counts[n], wanted + len(found) * probability(n)
        if wanted >= at_least:
            pairs.append((seen, wanted))
            left += wanted
            seen = wanted = 0.0
    rest = len(found) - sum(count for count, _ in pairs)
    return [*pairs, (rest, len(found) - left)] if len(found) - left > 1e-6 else pairs


@pytest.mark.parametrize(
    ("text", "probability"),
    [
        ("uniform(1, 6)", lambda n: 1 / 6 if n <= 6 else 0.0),
        ("uniform(3, 3)", lambda n: float(n == 3)),
        ("uniform(2, 40, seed=7)", lambda n: 1 / 39 if 2 <= n <= 40 else 0.0),
        ("poisson(0.3)", lambda n: one_or_more(n, 0.3)),
        ("poisson(2)", lambda n: one_or_more(n, 2)),
        ("poisson(8, seed=3)", lambda n: one_or_more(n, 8)),
        ("poisson(450)", lambda n: one_or_more(n, 450)),
        ("poisson(600)", lambda n: one_or_more(n, 600)),
        ("lognormal_poisson(mean=8, sigma=0.5)", lambda n: lognormal_poisson(n, 8, 0.5)),
        ("lognormal_poisson(mean=32, sigma=0.5)", lambda n: lognormal_poisson(n, 32, 0.5)),
    ],
)
def test_the_stated_distribution(text, probability):
    found = draws(text)
    assert min(found) >= 1
    cells = cells_of(found, probability)
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
    assert statistic <= chi_square_bound(len(cells))


@pytest.mark.parametrize("mean", [501, 2000, 10_000])
def test_a_large_mean(mean):
    """Quantiles against sums of the probabilities: at most 1 off, and that in 1 of 200 cases."""
    first = int(mean - 9 * math.sqrt(mean))
    sums = list(itertools.accumulate(poisson(n, mean) for n in range(first, 2 * mean)))
    off = []
    for i in range(2000):
        u = (i + 0.5) / 2000
        wanted = first + bisect.bisect_left(sums, u)
        off.append(Depth("poisson", (mean,)).of(iter([u])) - wanted)
    assert set(off) <= {-1, 0, 1}
    assert sum(map(abs, off)) <= 10


def test_a_number_beyond_all_sums():
    """The largest draw there is, above which rounding may hold the sum of the terms."""
    largest = 1 - 0.5 / 2**52
    for mean in (0.5, 8.0, 100.0, 499.0):
        n = Depth("poisson", (mean,)).of(iter([largest]))
        tail = sum(poisson(m, mean) for m in range(n + 1, n + 200))
        assert tail < 1e-12
        assert n < mean + 12 * math.sqrt(mean) + 20


@pytest.mark.parametrize("text", ["uniform(1, 6{})", "poisson(8{})", WIDE])
def test_draws_are_independent(text):
    """Of steps, of places, of seeds, of arguments: normal correlations, of deviation 1/sqrt(n)."""
    n = 4000
    one = draws(text.format(""), n)
    pairs = {
        "next step": (one[:-1], one[1:]),
        "the step after": (one[:-2], one[2:]),
        "place": (one, draws(text.format(""), n, place=1)),
        "seed": (one, draws(text.format(", seed=1"), n)),
        "step as seed": (one[1:], draws(text.format(", seed=1"), n)[:-1]),
        "argument": (one, draws(text.format(""), n, name="k")),
    }
    for name, (a, b) in pairs.items():
        correlation = torch.corrcoef(torch.tensor([a, b], dtype=torch.float64))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(n), name


def test_what_a_draw_depends_on():
    text = WIDE.format("")
    assert draws(text, 50) == draws(text, 50)  # as after a resume
    others = [
        draws(text, 50, place=1),
        draws(WIDE.format(", seed=1"), 50),
        draws(text, 50, name="k"),
    ]
    for a, b in itertools.combinations([draws(text, 50), *others], 2):
        assert not set(a) & set(b)
    assert len(set(draws(text, 50))) == 50
    code = (
        "import deq_phantom_plugin as dpp\n"
        "from deq_phantom_plugin.strategies.depth import number_or_depth\n"
        f"depth = number_or_depth('k', {text!r})\n"
        "print([depth.draw(dpp.Context(step=step)) for step in range(50)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(draws(text, 50))  # another process, another hash seed


def test_no_random_state_is_touched():
    before = torch.get_rng_state()
    draws("lognormal_poisson(mean=8, sigma=0.5)", 10)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "text",
    [
        "unifrom(1, 6)",
        "uniform",
        "uniform()",
        "uniform(6, 1)",
        "uniform(0, 1)",
        "uniform(1)",
        "uniform(1.5, 2)",
        "uniform(True, 2)",
        "uniform('1', 2)",
        "uniform(1, 2, 3)",
        "uniform(1, 2, high=3)",
        "uniform(low=1, low=1, high=3)",
        "uniform(1, 2, name=3)",
        "uniform(*[1, 2])",
        "uniform(1, 2).x",
        "uniform(1, 1 + 1)",
        "poisson(-1)",
        "poisson(0)",
        "poisson(nan)",
        "poisson(None)",
        "poisson(1e9)",
        "poisson(1e999)",
        "poisson([8])",
        "poisson(8, seed=-1)",
        "poisson(8, seed=True)",
        "poisson(8, seed=1.0)",
        "poisson(8, per_call=1)",
        "poisson(8, per_process='yes')",
        "lognormal_poisson(32)",
        "lognormal_poisson(mean=32, sigma=9)",
        "lognormal_poisson(mean=32, sigma=0)",
        "upg(k=5)",
        "8",
        "all(3)",
        "",
        "uniform(1, 2",
        "uniform(1, 2); 3",
        "\x00",
    ],
)
def test_what_is_no_distribution(text):
    for name in ("upg", "npg", "tbptt"):
        with pytest.raises(ValueError, match=r"k=.*expected a whole number of at least 1, or a di"):
            dpp.get_strategy({"name": name, "k": text})
    for name in ("bptt", "reversible"):
        with pytest.raises(ValueError, match=r"steps=.*expected a whole number of at least 1, or "):
            dpp.get_strategy({"name": name, "steps": text})
    with pytest.raises(ValueError, match=r"steps=.*expected a whole number of at least 1, or a d"):
        dpp.loop(torch.tanh, torch.zeros(2), text)
    with pytest.raises(ValueError, match=r"steps=.*expected a whole number of at least 1, or a d"):
        dpp.Equilibrium(steps=text)


@pytest.mark.parametrize(
    ("text", "message"),
    [("8", "leave out the quotes"), ("uniform(1, 6", "it does not parse"), ("", "name of a dist")],
)
def test_no_strategy_is_proposed_for_a_distribution(text, message):
    with pytest.raises(ValueError, match=message) as found:
        dpp.Equilibrium(steps=text)
    assert "upg" not in str(found.value)


@pytest.mark.parametrize("value", [0, -1, 2.5, True, None, [3], (1, 6), math.nan])
def test_what_is_no_number(value):
    with pytest.raises(ValueError, match=r"k=.*expected a whole number of at least 1"):
        dpp.UPG(k=value)


@pytest.mark.parametrize(
    ("kind", "arguments", "options", "message"),
    [
        ("unifrom", (1, 6), {}, "no distribution 'unifrom'.*did you mean 'uniform'"),
        ("uniform", (6, 1), {}, "high=1 is below low=6"),
        ("uniform", (1,), {}, "uniform takes low, high"),
        ("poisson", (math.inf,), {}, "mean=inf"),
        ("poisson", (8,), {"seed": -1}, "seed=-1"),
        ("poisson", (8,), {"per_call": 1}, "per_call=1"),
        ("lognormal_poisson", (8, 4), {}, r"sigma=4\.0; expected at most 3"),
    ],
)
def test_an_object_is_checked_as_a_string_is(kind, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        Depth(kind, arguments, **options)


DEPTHS = st.one_of(
    st.tuples(st.integers(1, 50), st.integers(0, 50)).map(
        lambda ab: Depth("uniform", (ab[0], ab[0] + ab[1]))
    ),
    st.floats(1e-3, 1e4).map(lambda mean: Depth("poisson", (mean,), seed=7, per_call=True)),
    st.tuples(st.floats(1e-3, 1e4), st.floats(1e-3, 3)).map(
        lambda args: Depth("lognormal_poisson", args, per_process=True)
    ),
)
# Each puts a spec inside a spec, and its quotes inside quotes.
WRAPPERS = {
    "guard": lambda spec: {"name": "guard", "grad": spec},
    "fallback": lambda spec: {"name": "guard", "on_failure": f"fallback({spec!r})"},
    "schedule": lambda spec: {"name": "schedule", "stages": {0: "jfb", 0.5: spec, 9: spec}},
    "ramp": lambda spec: {"name": "ramp", "grad": spec, "arguments": {"lam": (0.2, 0.7)}},
}


@given(DEPTHS, st.integers(0, 2**53), st.lists(st.sampled_from(sorted(WRAPPERS)), max_size=3))
def test_it_parses_back_and_draws_at_least_one(depth, step, wrappers):
    assert number_or_depth("k", str(depth)) == depth
    memory = dpp.Memory()
    memory.tell(step, None, 0)
    assert depth.draw(dpp.Context(memory=memory)) >= 1
    assert depth.typical >= 1
    spec = repr(dpp.UPG(k=depth))
    for name in wrappers:
        if name != "ramp" or spec.startswith("upg"):
            spec = repr(dpp.get_strategy(WRAPPERS[name](spec)))
    strategy = dpp.get_strategy(spec)
    assert repr(strategy) == spec
    assert dpp.get_strategy(repr(strategy)) == strategy
    assert hash(dpp.get_strategy(repr(strategy))) == hash(strategy)


def test_before_it_is_drawn_nobody_has_a_number():
    strategy = dpp.get_strategy("upg(k='poisson(3)')")
    for ask in (lambda: strategy.steps_ahead, lambda: strategy.within(4)):
        with pytest.raises(ValueError, match=r"until `resolve\(context\)` draws one"):
            ask()
    for spec in ("schedule({0: 'jfb', 5: 'tbptt(k=3)'})", "ramp('tbptt', {'k': (1, 3)}, until=5)"):
        composite = dpp.get_strategy(spec)
        with pytest.raises(ValueError, match=r"strategy that `resolve\(context\)` returns"):
            composite.steps_ahead  # noqa: B018
        assert composite.resolve(dpp.Context(step=5)).steps_ahead == 3


def test_a_step_that_nobody_told_is_said():
    with pytest.warns(dpp.AssumptionWarning, match="not told the training step"):
        dpp.get_strategy("upg(k='uniform(1, 3)')").resolve(dpp.Context(memory=dpp.Memory()))


def test_calls_that_nobody_counts_are_said():
    strategy = dpp.get_strategy("upg(k='uniform(1, 3, per_call=True)')")
    with pytest.warns(dpp.AssumptionWarning, match=r"nobody counts the calls.*dpp\.Memory"):
        strategy.resolve(dpp.Context(step=2))


def test_a_place_that_nobody_told_is_said():
    strategy = dpp.get_strategy("upg(k='uniform(1, 3)')")
    memory = dpp.Memory()
    memory.load_state_dict({"step": torch.tensor(3.0)})
    with pytest.warns(dpp.AssumptionWarning, match=r"all of them draw the same.*whole model"):
        strategy.resolve(dpp.Context(memory=memory))
    memory.tell(3, None, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        strategy.resolve(dpp.Context(memory=memory))


def test_a_report_draws_and_ramps_as_the_model_does():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 3)
            loops = [dpp.Equilibrium(steps=9, grad="tbptt(k='uniform(1, 9)')") for _ in range(2)]
            self.loops = torch.nn.ModuleList(loops)

        def forward(self, x):
            for loop in self.loops:
                x = loop(lambda h, x=x: torch.tanh(self.layer(h) + x), torch.zeros_like(x))
            return x

    model, x = Two(), torch.ones(2, 3)
    dpp.set_step(model, 5, total=10)
    k = [m.grad.resolve(dpp.Context(memory=m.memory)).k for m in model.loops]
    assert k[0] != k[1]
    grads = ["tbptt(k='uniform(1, 9)')", "ramp('tbptt', {'k': (1, 5)}, until=1.0)"]
    found = dpp.model_report(model, x, lambda h: h.sum(), grads)
    for number, report in zip(k, found.reports, strict=True):
        rows = {result.strategy: result for result in report.results}
        assert rows[grads[0]].n_evaluations == number
        assert rows[str(dpp.get_strategy(grads[1]))].n_evaluations == 3
