"""`auto`: what it measures, what it takes, and when."""

from __future__ import annotations

import copy
import io
import itertools
import math
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import deq_phantom_plugin as dpp
from deq_phantom_plugin.strategies import auto as module
from deq_phantom_plugin.strategies.candidates import LAMS, Candidate
from deq_phantom_plugin.strategies.choice import Choice, Rule, Shared

EVERY = 10


def spectrum(eigenvalues, pairs=(), samples=6, seed=0):
    """Normal matrices of given real eigenvalues and complex pairs, one a sample; float64."""
    generator = torch.Generator().manual_seed(seed)
    blocks = [torch.tensor([[e]], dtype=torch.float64) for e in eigenvalues]
    blocks += [torch.tensor([[a, -b], [b, a]], dtype=torch.float64) for a, b in pairs]
    core = torch.block_diag(*blocks)
    size = len(core)
    bases = torch.linalg.qr(
        torch.randn(samples, size, size, generator=generator, dtype=torch.float64)
    ).Q
    return bases @ core @ bases.mT


SPECTRA = {
    "0.5": spectrum([0.5, *torch.linspace(-0.5, 0.45, 11).tolist()]),
    "0.99": spectrum([0.99, *torch.linspace(-0.6, 0.9, 11).tolist()]),
    "-1.4": spectrum([-1.4, *torch.linspace(-1.2, 0.6, 11).tolist()]),
    "pairs": spectrum([0.3, -0.2], [(0.5, 0.7), (-0.4, 1.0), (0.1, -0.8), (0.6, 0.2)]),
}


class Linear(nn.Module):
    """h = A h + u, solved exactly, with a loss of a given gradient."""

    def __init__(self, matrix, grad="auto", coupled=False):
        super().__init__()
        samples, size = matrix.shape[:2]
        if coupled:  # rows of one state, mixed with one another
            matrix = spectrum([0.6, *torch.linspace(-0.5, 0.5, samples * size - 1).tolist()])[:1]
        self.matrix, self.coupled = matrix, coupled
        self.grad, self.memory = dpp.get_strategy(grad), dpp.Memory()
        generator = torch.Generator().manual_seed(1)
        draw = lambda: torch.randn(samples, size, generator=generator, dtype=torch.float64)  # noqa: E731
        self.inject, self.v = nn.Parameter(draw()), draw()
        self.evaluations = self.products = 0

    def func(self, h):
        self.evaluations += 1
        rows = h.reshape(len(self.matrix), -1, 1)
        out = (self.matrix @ rows).view_as(h) + self.inject
        if out.requires_grad:
            out.register_hook(self.count)
        return out

    def count(self, _):
        self.products += 1

    def solved(self, right, transposed=False):
        matrix = self.matrix.mT if transposed else self.matrix
        system = torch.eye(matrix.shape[1], dtype=torch.float64) - matrix
        return torch.linalg.solve(system, right.reshape(len(matrix), -1, 1)).view_as(right)

    @property
    def exact(self):
        return self.solved(self.v, transposed=True)

    def gradient(self, spec=None, state=None, v=None, context=None):
        """The gradient of the injection, which is g."""
        state = self.solved(self.inject.detach()) if state is None else state
        batch_dim = None if self.coupled else 0
        context = context or dpp.Context(batch_dim=batch_dim, memory=self.memory)
        attached = dpp.attach(self.func, state, self.grad if spec is None else spec, context)
        return torch.autograd.grad(attached, self.inject, self.v if v is None else v)[0]

    def at(self, step, **options):
        """The gradient of a training step."""
        dpp.set_step(self, step)
        return self.gradient(**options)

    def cosines(self, g):
        """To the exact gradient, of each system."""
        flat = lambda x: x.reshape(len(self.matrix), -1)  # noqa: E731
        return torch.cosine_similarity(flat(g), flat(self.exact), dim=1)

    @property
    def chosen(self):
        return dpp.report_choice(self)[-1]


def low(cosines):
    """What at least 90 % reach: of fewer than ten samples all."""
    return float(cosines.sort().values[len(cosines) // 10])


def cost(spec, model):
    """Evaluations of F, backward passes counted as two, counted while a strategy runs."""
    model.evaluations = model.products = 0
    found = model.gradient(spec, context=dpp.Context(batch_dim=None if model.coupled else 0))
    return model.evaluations + 2 * model.products, low(model.cosines(found))


# --- the spec -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        "auto",
        "auto(0.9)",
        "auto(cosine=1.0, every=1)",
        "auto(budget=3)",
        "auto(methods=['jfb', \"guard('npg')\"], every=5)",
    ],
)
def test_its_repr_parses_back(spec):
    strategy = dpp.get_strategy(spec)
    assert dpp.get_strategy(repr(strategy)) == strategy
    assert hash(dpp.get_strategy(repr(strategy))) == hash(strategy)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("auto(cosine=0)", r"cosine=0; expected a number in \(0, 1\]"),
        ("auto(cosine=1.01)", "cosine=1.01"),
        ("auto(cosine=-0.5)", "cosine=-0.5"),
        ("auto(cosine='high')", "cosine='high'"),
        ("auto(cosine=True)", "cosine=True"),
        ("auto(every=0)", "every=0; expected a whole number of at least 1"),
        ("auto(every=2.5)", "every=2.5"),
        ("auto(budget=0)", "budget=0; expected a whole number of at least 1"),
        ("auto(methods=[])", r"methods=\[\]; expected a list of specs"),
        ("auto(methods='upg')", "methods='upg'; expected a list of specs"),
        ("auto(methods=['nothing'])", "unknown strategy 'nothing'"),
        ("auto(methods=['jfb', 'bptt'])", r"bptt\(steps=10\) owns its solve"),
        ("auto(methods=['reversible'])", "owns its solve"),
        ("auto(methods=[\"schedule({0: 'jfb', 5: 'upg'})\"])", "changes with the training step"),
        ("auto(methods=[\"upg(k='uniform(1, 6)')\"])", "or draws"),
        ("auto(methods=['auto'])", "changes with the training step"),
    ],
)
def test_what_is_wrong_is_named(spec, words):
    with pytest.raises(ValueError, match=words):
        dpp.get_strategy(spec)


def test_truncated_backpropagation_may_be_a_method():
    """At an equilibrium it is `upg`; it does not own the solve."""
    assert dpp.get_strategy("auto(methods=['tbptt(k=2)', 'ift'])").strategies


# --- what it measures ---------------------------------------------------------------------------


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


RUN = ["jfb"]
RUN += [f"npg(k={k}, lam={lam})" for k in (2, 3, 7, 20) for lam in (1.0, 0.6, 0.1)]
RUN += ["upg(k=1, lam=1.0)", "upg(k=6, lam=0.4)", "ift(tol=0.3)", "ift(tol=0.01)", "ift"]


@pytest.mark.parametrize("coupled", [False, True], ids=["independent", "coupled"])
@pytest.mark.parametrize("name", SPECTRA)
def test_cosines_and_costs_are_those_of_the_methods_themselves(judged, name, coupled):
    """Each method is run and its g compared with a dense solve."""
    model = Linear(SPECTRA[name], coupled=coupled)
    model.at(0)
    for spec in RUN:
        counted, cosine = cost(spec, model)
        assert judged[spec].cosine == pytest.approx(cosine, abs=1e-3), spec
        assert judged[spec].cost == counted, spec


def safe_lams(model):
    """The damping factors that contract also where 1 - mu of all eigenvalues is larger by 1.2."""
    mu = torch.linalg.eigvals(model.matrix).flatten()
    return [lam for lam in LAMS if (1 - 1.2 * lam * (1 - mu)).abs().max() < 1]


@pytest.mark.parametrize("coupled", [False, True], ids=["independent", "coupled"])
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("cosine", [0.9, 0.95, 0.99])
def test_it_takes_what_an_exhaustive_search_takes_or_better(name, coupled, cosine):
    """All of jfb, npg that contracts and ift are run; what is taken is run too."""
    model = Linear(SPECTRA[name], f"auto(cosine={cosine})", coupled)
    model.at(0)
    searched = [f"npg(k={k}, lam={lam})" for lam in safe_lams(model) for k in range(2, 25)]
    found = [cost(spec, model) for spec in ["jfb", "ift", *searched]]
    least = min(price for price, quality in found if quality >= cosine)
    price, quality = cost(model.chosen.spec, model)
    assert quality >= cosine - 1e-3
    assert price <= least
    assert price == model.chosen.cost


def test_the_low_decile_counts_and_not_the_worst_sample():
    """Of 20 samples two may be beyond."""
    easy, hard = spectrum([0.1, 0.0, -0.1], samples=18), spectrum([0.97, 0.0, -0.9], samples=2)
    model = Linear(torch.cat([easy, hard]))
    model.at(0)
    assert model.chosen.spec == "jfb"
    assert model.chosen.cosine == pytest.approx(cost("jfb", model)[1], abs=1e-4)
    worse = Linear(torch.cat([easy[:12], hard, spectrum([0.97, 0.0, -0.9], samples=6, seed=3)]))
    worse.at(0)
    assert worse.chosen.cost > 3


@pytest.mark.parametrize("coupled", [False, True], ids=["independent", "coupled"])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_gradient_of_a_measuring_step_is_the_reference(name, coupled):
    model = Linear(SPECTRA[name], coupled=coupled)
    g = model.at(0)
    assert (g - model.exact).norm() < 1e-2 * model.exact.norm()
    residual = model.v - g + (model.matrix.mT @ g.reshape(len(model.matrix), -1, 1)).view_as(g)
    assert residual.norm() <= 1e-4 * model.v.norm()


def test_a_measurement_takes_no_products_beyond_its_reference():
    model = Linear(SPECTRA["0.99"])
    told = []
    dpp.set_step(model, 0)
    model.evaluations = model.products = 0
    context = dpp.Context(batch_dim=0, memory=model.memory, monitor=told.append)
    model.gradient(context=context)
    assert model.evaluations == 1
    assert model.products == told[0].n_vjp + 1
    model.evaluations = model.products = 0
    told.clear()
    model.gradient("ift", context=dpp.Context(batch_dim=0, monitor=told.append))
    assert dpp.report_choice(model)
    assert told[0].n_vjp + 1 == model.products


def test_more_than_a_space_of_50_vectors_is_solved_by_going_on(judged):
    matrix = spectrum(torch.linspace(-0.995, 0.995, 120).tolist(), samples=2)
    model = Linear(matrix)
    g = model.at(0)
    assert (g - model.exact).norm() < 1e-2 * model.exact.norm()
    for spec in ("npg(k=5, lam=1.0)", "npg(k=50, lam=0.5)"):
        assert judged[spec].cosine == pytest.approx(cost(spec, model)[1], abs=1e-3)


# --- over the steps -----------------------------------------------------------------------------


def test_at_rho_one_half_it_takes_less_than_0_7_of_the_products_of_ift():
    counts = []
    for grad in ("auto", "ift"):
        model = Linear(SPECTRA["0.5"], grad)
        for step in range(200):
            model.at(step)
        counts.append(model.products)
    assert counts[0] <= 0.7 * counts[1]


@pytest.mark.parametrize(("solve", "most"), [(22, 1.05), (6, 1.08)])
def test_it_costs_little_more_than_what_it_settled_on(solve, most):
    """Counted over 1,000 steps, evaluations of the solve included."""
    model = Linear(SPECTRA["-1.4"])
    for step in range(1000):
        model.at(step)
    spent = model.evaluations + 2 * model.products + 1000 * solve
    settled = 1000 * (cost(model.chosen.spec, model)[0] + solve)
    assert len({record.spec for record in dpp.report_choice(model)}) == 1
    assert spent <= most * settled


def test_after_a_change_of_spectrum_it_changes_within_every_steps():
    model = Linear(SPECTRA["0.5"], f"auto(every={EVERY})")
    for step in range(3 * EVERY):
        if step == EVERY + 1:
            before = model.chosen
            model.matrix = SPECTRA["0.99"]
        g = model.at(step)
    assert before.cost < model.chosen.cost
    changed = next(r for r in dpp.report_choice(model) if r.cost > before.cost)
    assert EVERY + 1 <= changed.step <= 2 * EVERY + 1
    assert low(model.cosines(g)) >= 0.95 - 1e-3


@pytest.mark.parametrize(
    ("first", "steps"),
    [
        (0, [0, 25, 50, 100, 200, 400, 600]),  # an eighth of 200, a quarter, half
        (30, [30, 60, 120, 240, 440, 640]),
        (1000, [1000, 1200, 1400, 1600]),  # as after a load
    ],
)
def test_it_measures_at_the_first_step_soon_after_and_then_every_so_many(first, steps):
    model, measured = Linear(SPECTRA["0.5"]), []
    for step in range(first, steps[-1] + 1):
        dpp.set_step(model, step)
        if isinstance(model.grad.resolve(context_of(model)), module.Measuring):
            measured.append(step)
            model.gradient()
    assert measured == steps


def test_a_choice_that_goes_stale_in_the_first_steps_is_found_out_soon():
    """The spectrum of an untrained model is not what it is a few steps later."""
    model = Linear(SPECTRA["0.5"])
    words = r"step 25: npg\(k=2, lam=1.0\), as chosen in step 0, does not contract everywhere any"
    with pytest.warns(dpp.ConvergenceWarning, match=words) as seen:
        for step in range(30):
            if step == 10:
                model.matrix = SPECTRA["-1.4"]
            g = model.at(step)
    assert len(seen) == 1
    assert model.chosen.why.endswith("; npg(k=2, lam=1.0) does not contract everywhere any more")
    assert low(model.cosines(g)) >= 0.95 - 1e-3


def test_what_the_choice_before_has_come_to_is_told():
    model = Linear(SPECTRA["0.5"], "auto(every=1)")
    model.at(0)
    before = model.chosen.spec
    model.matrix = SPECTRA["0.99"]
    model.at(1)
    cosine = cost(before, model)[1]
    assert cosine < 0.9
    said, told = model.chosen.why.rsplit(" ", 1)
    assert said.endswith(f"; {before} is at")
    assert float(told) == pytest.approx(cosine, abs=2e-3)
    model.at(2)  # nothing changes
    assert model.chosen.why == "kept, the cheapest with a cosine of at least 0.95"


def test_a_step_that_stands_still_is_said_once():
    model = Linear(SPECTRA["0.5"], "auto")
    dpp.set_step(model, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(module._MANY):  # the first measures
            model.gradient()
    with pytest.warns(dpp.AssumptionWarning, match="was told step 4 for 100 more") as seen:
        for _ in range(module._MANY + 1):
            model.gradient()
    assert len(seen) == 1


def context_of(model):
    return dpp.Context(batch_dim=0, memory=model.memory)


def test_on_a_border_nothing_flutters():
    """The spectrum moves a little to and fro, so that the cheapest that is good enough does."""
    generator = torch.Generator().manual_seed(0)
    border = cost("npg(k=3, lam=0.8)", Linear(SPECTRA["-1.4"]))[1]
    rule, fresh_specs = f"auto(cosine={border}, every=1)", []
    model = Linear(SPECTRA["-1.4"], rule)
    v = model.v
    for step in range(60):
        noise = 1 + 0.02 * torch.randn((), generator=generator, dtype=torch.float64)
        model.matrix = SPECTRA["-1.4"] * noise
        fresh = Linear(model.matrix, rule)
        fresh.v = model.v = v + 0.05 * torch.randn(6, 12, generator=generator).double()
        fresh.at(0)
        fresh_specs.append(fresh.chosen.spec)
        model.at(step)
    specs = [record.spec for record in dpp.report_choice(model)]
    assert sum(a != b for a, b in itertools.pairwise(fresh_specs)) > 10  # where nothing is kept
    assert sum(a != b for a, b in itertools.pairwise(specs)) <= 2


def candidate(spec, cosine, price):
    return Candidate(spec, spec.startswith("upg"), cosine, 1, (price - 1) / 2)


def found(*candidates, **numbers):
    known = {"rows": 8, "settled": 1.0, "supported": 1.0, "radii": [0.5] * 10, "broken": False}
    known["steeper"] = numbers.get("radii", known["radii"])
    known["most"] = [50.0] * 10
    return Shared(candidates, **{**known, **numbers})


def test_what_is_in_force_goes_on_until_it_fails_or_something_is_surely_cheaper():
    rule, last = Rule(0.95, None, False), Choice(0, "b", 0.96, 7.0, "")
    for cosine, price, want in [
        (0.96, 5, "b"),  # good enough, but hardly
        (0.967, 5, "a"),  # by more than a third of the way to 1
        (0.999, 6.5, "b"),  # hardly cheaper
    ]:
        numbers = found(candidate("a", cosine, price), candidate("b", 0.951, 7))
        assert rule.decide(numbers, last, 1)[0].spec == want
    numbers = found(candidate("a", 0.951, 8), candidate("b", 0.949, 7))
    assert rule.decide(numbers, last, 1)[0].spec == "a"


def test_where_none_is_good_enough_it_is_ift_which_is_said_once():
    model = Linear(SPECTRA["0.99"], "auto(methods=['jfb', 'npg(k=2)'], every=1)")
    with pytest.warns(dpp.ConvergenceWarning, match="no method has a cosine of at least") as seen:
        for step in range(3):
            model.at(step)
    assert len(seen) == 1
    assert model.chosen.spec == "npg(k=2, lam=0.5)"  # the better of what was allowed
    rule = Rule(0.95, None, True)
    numbers = found(candidate("jfb", 0.5, 3), candidate("ift", 0.9, 30))
    choice, wanting = rule.decide(numbers, None, 0)
    assert (choice.spec, wanting) == ("ift", True)


# --- a budget -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:ift.*the adjoint solve stopped")
@pytest.mark.parametrize("budget", [1, 2, 3, 5, 8, 13, 14])
@pytest.mark.parametrize("name", SPECTRA)
def test_a_budget_gives_the_best_gradient_for_so_many_products(name, budget):
    """Of series, and of a solve with the rest after the product to the parameters."""
    model = Linear(SPECTRA[name], f"auto(budget={budget})")
    model.at(0)
    searched = [f"npg(k={k}, lam={lam})" for lam in safe_lams(model) for k in range(2, budget + 1)]
    searched += ["jfb"]
    searched += [f"ift(max_iter={budget - 1})"] if budget > 3 else []
    best = max(cost(spec, model)[1] for spec in searched)
    price, quality = cost(model.chosen.spec, model)
    assert model.products <= budget
    assert price == model.chosen.cost
    assert quality >= best - 1e-3


# --- where the equilibrium is none ---------------------------------------------------------------


@pytest.mark.parametrize("budget", [None, 3])
def test_away_from_the_equilibrium_it_unrolls(budget):
    grad = "auto" if budget is None else f"auto(budget={budget})"
    model = Linear(SPECTRA["0.5"], grad)
    far = model.solved(model.inject.detach()) + 5
    with pytest.warns(dpp.ConvergenceWarning, match="not at its equilibrium in 100% of the"):
        g = model.at(0, state=far)
    assert torch.equal(g, model.v)  # one step's gradient
    assert model.chosen.spec == f"upg(k={budget or 5}, lam=1.0)"
    assert (model.chosen.cosine, model.chosen.cost) == (None, 3 * (budget or 5))
    torch.testing.assert_close(model.at(1, state=far), model.gradient(model.chosen.spec, far))


def test_away_from_the_equilibrium_it_looks_ten_times_as_often_for_ten_products():
    model, products = Linear(SPECTRA["0.99"], "auto(every=100)"), []
    far = model.solved(model.inject.detach()) + 50
    with pytest.warns(dpp.ConvergenceWarning, match="not at its equilibrium"):
        for step in range(25):
            model.products = 0
            model.at(step, state=far if step < 15 else None)
            products.append(model.products)
    assert products[0] == products[10] == 12  # one tells the residual, one is the parameters'
    assert model.memory.histories["auto"]["measured"] == 20
    assert model.chosen.cosine >= 0.95


@pytest.mark.filterwarnings("ignore:auto.*not at its equilibrium")
@pytest.mark.parametrize(("every", "looks"), [(1, 20), (5, 8), (10, 4), (100, 4), (400, 1)])
def test_away_from_the_equilibrium_most_steps_unroll_whatever_every_is(every, looks):
    model = Linear(SPECTRA["0.5"], f"auto(every={every})")
    far, measured = model.solved(model.inject.detach()) + 5, 0
    for step in range(40):
        measured += torch.equal(model.at(step, state=far), model.v)
    assert measured == looks


def test_the_damping_of_unrolled_steps_stays_while_they_contract():
    rule, first = Rule(0.95, None, True), None
    for radii, want in [
        ([1.1, 1.02, 0.9, *[0.8] * 7], "upg(k=5, lam=0.8)"),
        ([0.9, 0.9, 0.95, *[0.8] * 7], "upg(k=5, lam=0.8)"),
        ([1.3, 1.2, 1.1, *[0.9] * 7], "upg(k=5, lam=0.7)"),
        ([1.3] * 10, "upg(k=5, lam=0.5)"),
    ]:
        first, wanting = rule.decide(found(settled=0.2, radii=radii), first, 0)
        assert (first.spec, wanting) == (want, True)


def test_a_series_that_may_reverse_a_direction_is_not_taken():
    """v sees little of an eigenvalue of -1.5: two undamped terms are near, but reverse that."""
    matrix = spectrum([-1.5, *torch.linspace(-0.3, 0.3, 11).tolist()])
    model = Linear(matrix)
    _, vectors = torch.linalg.eigh(matrix)
    weak = vectors[:, :, 0]
    model.v = (vectors[:, :, 1:].sum(2) + 0.3 * weak).detach()
    model.at(0)
    assert cost("npg(k=2, lam=1.0)", model)[1] >= 0.95
    assert model.chosen.spec != "npg(k=2, lam=1.0)"
    exact, g = ((weak * x).sum(1) for x in (model.exact, model.gradient(model.chosen.spec)))
    assert (exact * g > 0).all()
    assert (exact * (weak * model.gradient("npg(k=2, lam=1.0)")).sum(1) < 0).all()


def disc(radius, samples, size=60, seed=0):
    """Matrices whose eigenvalues fill a disc, as those of independent weights do; float64."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(samples, size, size, generator=generator, dtype=torch.float64)
    return radius * drawn / size**0.5


@pytest.mark.filterwarnings("ignore:ift.*the adjoint solve stopped after")
def test_a_series_that_grows_in_a_tenth_of_the_samples_is_not_taken():
    """Their g would drown the other samples', whose cosines are good."""
    hard = spectrum([-2.2, -2.0, *torch.linspace(-0.5, 0.5, 58).tolist()], samples=2)
    model = Linear(torch.cat([disc(0.85, 18), hard]), "auto(cosine=0.9)")
    model.at(0)
    lengths = lambda spec: model.gradient(spec).norm(dim=1) / model.exact.norm(dim=1)  # noqa: E731
    grows = "npg(k=21, lam=0.8)"
    assert cost(grows, model)[1] >= 0.9
    assert lengths(grows)[18:].min() > 10
    assert lengths(grows)[:18].max() < 1.5
    price, quality = cost(model.chosen.spec, model)
    assert (price, quality) == (model.chosen.cost, pytest.approx(model.chosen.cosine, abs=1e-3))
    assert quality >= 0.9
    assert lengths(model.chosen.spec).max() <= 2


@pytest.mark.parametrize("samples", [10, 20, 30, 70])
def test_where_a_tenth_of_the_samples_is_off_the_others_are_judged(samples):
    """A tenth is not more than a tenth, in floating-point numbers too."""
    model = Linear(spectrum([0.5, 0.2, -0.4], samples=samples))
    state = model.solved(model.inject.detach())
    state[: samples // 10] += 5
    g = model.at(0, state=state)
    assert model.chosen.why == "the cheapest with a cosine of at least 0.95"
    others = slice(samples // 10, None)
    torch.testing.assert_close(g[others], model.exact[others], rtol=1e-3, atol=1e-3)


def test_samples_that_are_off_get_one_step_and_the_others_the_reference():
    model = Linear(spectrum([0.5, 0.2, -0.4], samples=20))
    state = model.solved(model.inject.detach())
    state[3] += 5
    g = model.at(0, state=state)
    assert torch.equal(g[3], model.v[3])
    others = [i for i in range(20) if i != 3]
    torch.testing.assert_close(g[others], model.exact[others], rtol=1e-3, atol=1e-3)
    assert not model.chosen.why.startswith("not at")  # one in twenty


def test_where_no_damping_contracts_it_unrolls():
    model = Linear(spectrum([1.4, *torch.linspace(-0.5, 0.5, 11).tolist()]))
    with pytest.warns(
        dpp.ConvergenceWarning, match="no damping brings the radius below 1, the lowest is 1.04"
    ):
        g = model.at(0)
    torch.testing.assert_close(g, model.exact, rtol=1e-2, atol=1e-2)
    assert model.chosen.spec == "upg(k=5, lam=0.5)"


def test_no_unrolling_is_taken_that_costs_more_than_a_solve():
    """Its graphs would be kept, all of them: seen on CIFAR-10, 45 steps where `ift` was cheaper."""
    short, long = (
        candidate("upg(k=9, lam=0.9)", 0.96, 27),
        candidate("upg(k=45, lam=0.9)", 0.97, 91),
    )
    solve = candidate("ift", 0.9, 90)
    outside = {"radii": [1.01] * 10}
    rule = Rule(0.95, None, True)
    choice, wanting = rule.decide(found(short, long, solve, **outside), None, 0)
    assert (choice.spec, wanting) == (short.spec, False)
    choice, wanting = rule.decide(found(long, solve, **outside), None, 0)
    assert (choice.spec, wanting) == ("upg(k=5, lam=0.5)", True)
    mine = Rule(0.95, None, False)  # of a user's own methods the last is no solve
    assert mine.decide(found(long, solve, **outside), None, 0)[0].spec == long.spec


@pytest.mark.filterwarnings("ignore:auto.*no damping brings the radius below 1")
@pytest.mark.parametrize(("budget", "want"), [("", "ift("), (", budget=3", "npg(k=2")])
def test_where_no_damping_contracts_and_no_method_unrolls_the_best_acts(budget, want):
    """A long series leads away there, and the reference still tells."""
    model = Linear(
        spectrum([1.4, *torch.linspace(-0.5, 0.5, 11).tolist()]),
        f"auto(methods=['npg(k=9)', 'npg(k=2)', 'ift']{budget})",
    )
    model.at(0)
    assert model.chosen.spec.startswith(want)
    assert model.chosen.cosine == pytest.approx(cost(model.chosen.spec, model)[1], abs=1e-3)
    assert cost("npg(k=9)", model)[1] < 0


def test_the_radius_that_is_told_is_that_of_the_damped_map():
    """An eigenvalue of -1.4 is damped; the strategies' table says so too."""
    model = Linear(SPECTRA["-1.4"])
    model.at(0)
    assert not model.chosen.why.startswith("no damping")


def test_a_reference_that_is_not_solved_judges_nothing():
    rule = Rule(0.95, None, True)
    numbers = found(candidate("jfb", 0.99, 3), candidate("ift", 1.0, 200), supported=0.5)
    choice, wanting = rule.decide(numbers, None, 0)
    assert (choice.spec, choice.cosine, wanting) == ("ift", None, True)
    assert choice.why == "the reference was not solved in 50% of the samples"


# --- a user's methods ---------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Mine(dpp.GradStrategy):
    """Two steps, of which the second counts twice."""

    def attach(self, func, equilibrium, context):
        once = func(equilibrium)
        twice = func(once)
        return twice + (once - once.detach())


def test_methods_of_the_users_are_run(judged):
    dpp.register_strategy("mine")(Mine)

    def two(func, equilibrium, context):
        return func(func(equilibrium))

    methods = ["mine", two, "npg(k=9, lam='adaptive')", "ift(tol=1e-2)"]
    model = Linear(SPECTRA["0.5"])
    model.grad = dpp.Auto(methods=methods)
    model.at(0)
    for spec in methods:
        counted, cosine = cost(spec, model)
        key = repr(dpp.get_strategy(spec))
        assert judged[key].cosine == pytest.approx(cosine, abs=1e-3)
        assert judged[key].cost == counted
    good = [c for c in judged.values() if c.cosine >= 0.95]
    assert model.chosen.spec == min(good, key=lambda c: (c.cost, -c.cosine)).spec
    torch.testing.assert_close(model.at(1), model.gradient(model.grad._named(model.chosen.spec)))


def test_a_method_that_cannot_be_measured_is_refused_in_words():
    def broken(func, equilibrium, context):
        raise ZeroDivisionError("of my own")

    model = Linear(SPECTRA["0.5"])
    model.grad = dpp.Auto(methods=["jfb", broken])
    with pytest.raises(RuntimeError, match=r"broken cannot be measured .* of my own"):
        model.at(0)


def test_shine_is_told_the_inverse_jacobian():
    assert dpp.get_strategy("auto(methods=['shine', 'ift'])").wants_inverse_jacobian
    assert not dpp.get_strategy("auto").wants_inverse_jacobian
    model = Net("auto(methods=['shine', 'ift'])", solver="broyden")
    dpp.set_step(model, 0)
    model.loss(0).backward()
    assert {record.spec.partition("(")[0] for record in dpp.report_choice(model)} <= {
        "shine",
        "ift",
    }


def test_methods_are_run_without_a_trace():
    model = Linear(SPECTRA["0.5"], "auto(methods=['npg', 'upg'])")
    norm = nn.BatchNorm1d(12, affine=False).double()
    plain = model.func
    model.func = lambda h: plain(h) + 0 * norm(h)
    state = torch.get_rng_state()
    dpp.set_step(model, 0)
    model.gradient(context=dpp.Context(batch_dim=None, memory=model.memory))
    assert norm.num_batches_tracked == 1  # of the strategy's own evaluation
    assert torch.equal(torch.get_rng_state(), state)


# --- what is kept -------------------------------------------------------------------------------


class Net(nn.Module):
    """An equilibrium in a model that trains."""

    def __init__(self, grad="auto", size=12, **options):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.inject = nn.Linear(size, size), nn.Linear(4, size)
        nn.init.orthogonal_(self.inner.weight, 0.7)
        self.equilibrium = dpp.Equilibrium(
            grad=grad, **{"tol": 1e-4, "max_iter": 100, "batch_dim": 0, **options}
        )

    def forward(self, x):
        u = self.inject(x)
        return self.equilibrium(lambda h: torch.tanh(self.inner(h) + u), torch.zeros_like(u))

    def loss(self, step, rows=8):
        x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(step))
        return self(x).square().mean()


def train(model, steps):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in steps:
        dpp.set_step(model, step)
        optimizer.zero_grad()
        model.loss(step).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_a_resumed_run_goes_on_with_its_choice():
    model = Net(f"auto(every={EVERY})")
    train(model, range(EVERY + 3))
    file = io.BytesIO()
    torch.save([model.state_dict(), dpp.memory_state_dict(model)], file)
    file.seek(0)
    state, memory = torch.load(file, weights_only=True)
    other = Net(f"auto(every={EVERY})")
    other.load_state_dict(state)
    dpp.load_memory_state_dict(other, memory)
    assert dpp.report_choice(other) == dpp.report_choice(model)
    want = train(model, range(EVERY + 3, 3 * EVERY))
    got = train(other, range(EVERY + 3, 3 * EVERY))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert dpp.report_choice(other) == dpp.report_choice(model)


def test_without_what_was_kept_the_next_step_measures():
    model, other = Net("auto"), Net("auto")
    train(model, range(3))
    other.load_state_dict(model.state_dict())
    assert not dpp.report_choice(other)
    train(other, range(3, 5))
    assert other.equilibrium.memory.histories["auto"]["measured"] == 3


def test_two_runs_of_one_seed_are_equal_to_the_bit():
    runs = [Net(f"auto(every={EVERY})") for _ in range(2)]
    first, second = (train(model, range(2 * EVERY)) for model in runs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert dpp.report_choice(runs[0]) == dpp.report_choice(runs[1])


def test_another_auto_begins_anew():
    model = Net("auto(cosine=0.9)")
    train(model, range(2))
    dpp.set_grad(model, "auto(cosine=0.99)")
    train(model, range(2, 4))
    assert [record.step for record in dpp.report_choice(model)] == [0, 2]


def test_of_the_same_choices_in_a_row_the_first_and_the_last_are_kept():
    model = Linear(SPECTRA["0.5"], "auto(every=1)")
    for step in range(9):
        model.at(step)
    assert [record.step for record in dpp.report_choice(model)] == [0, 8]


def test_the_report_is_a_table():
    model = Net("auto")
    assert repr(dpp.report_choice(model)) == (
        "auto has chosen nothing here: either no equilibrium of this model has the method auto, or "
        "none has done a backward pass in training yet"
    )
    train(model, range(1))
    (record,) = dpp.report_choice(model)
    header, _, row = repr(dpp.report_choice(model)).splitlines()
    assert header.split() == ["equilibrium", "step", "strategy", "cosine", "cost", "why"]
    assert row.startswith("equilibrium ")
    assert record.spec in row
    assert record.why in row
    assert isinstance(dpp.get_strategy(record.spec), dpp.GradStrategy)


def test_the_monitor_logs_what_was_chosen():
    model, told = Net("auto(every=2)"), []
    with dpp.monitor(model, lambda numbers, step: told.append(numbers), every=1):
        train(model, range(2))
    assert "equilibrium/chosen_cost" not in told[0]
    record = dpp.report_choice(model)[0]
    assert told[1]["equilibrium/chosen_cost"] == record.cost
    assert told[1]["equilibrium/chosen_cosine"] == record.cosine


def test_the_monitor_and_reports_leave_no_trace():
    watched, plain = Net(f"auto(every={EVERY})"), Net(f"auto(every={EVERY})")
    with dpp.monitor(watched, lambda numbers, step: None, every=1):
        got = train(watched, range(EVERY + 2))
    want = train(plain, range(EVERY + 2))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    fresh = Net("auto")
    dpp.set_step(fresh, 0)
    report = dpp.model_report(fresh, torch.randn(8, 4), lambda h: h.square().mean(), ["jfb"])
    assert not dpp.report_choice(fresh)
    row = report.reports[0].results[0]
    assert row.strategy == repr(fresh.equilibrium.grad)
    assert row.cosine > 1 - 1e-6


# --- in a training ------------------------------------------------------------------------------


def test_several_calls_of_a_step_measure_once_and_have_the_same_gradient():
    """Gradient accumulation: also where all calls come before the first backward pass."""
    model = Linear(SPECTRA["0.5"], f"auto(every={EVERY})")
    for step in (0, EVERY):
        first, second = model.at(step), model.gradient()
        assert torch.equal(first, second)
        assert [r.step for r in dpp.report_choice(model)].count(step) == 1
    together = Linear(SPECTRA["0.5"])
    dpp.set_step(together, 0)
    state = together.solved(together.inject.detach())
    attached = [dpp.attach(together.func, state, "auto", context_of(together)) for _ in range(2)]
    loss = sum((a * together.v).sum() for a in attached)
    (g,) = torch.autograd.grad(loss, together.inject)
    torch.testing.assert_close(g, 2 * first)
    assert len(dpp.report_choice(together)) == 1


def test_where_nobody_tells_the_step_it_measures_once_and_says_so():
    model = Linear(SPECTRA["0.5"], "auto(every=1)")
    with pytest.warns(dpp.AssumptionWarning, match="was not told the training step"):
        for _ in range(3):
            g = model.gradient()
    assert len(dpp.report_choice(model)) == 1
    assert torch.equal(g, model.gradient(model.chosen.spec))


def test_without_a_memory_it_is_the_reference_and_says_so():
    model = Linear(SPECTRA["0.5"])
    with pytest.warns(dpp.AssumptionWarning, match="has no memory"):
        g = model.gradient(context=dpp.Context(batch_dim=0, step=3))
    torch.testing.assert_close(g, model.exact, rtol=1e-3, atol=1e-3)


def test_evaluation_measures_nothing():
    model = Net("auto", grad_in_eval=True).eval()
    model.loss(0).backward()  # no step is told, and none is needed: a warning would be an error
    dpp.set_step(model, 0)
    model.loss(0).backward()
    assert not dpp.report_choice(model)
    train(model.train(), range(1))
    chosen = model.equilibrium.grad._named(dpp.report_choice(model)[-1].spec)
    model.eval()
    assert model.equilibrium.grad.resolve(model.equilibrium.context(torch.zeros(1))) == chosen


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_step_that_grad_scaler_drops_measures_nothing(bad):
    model = Linear(SPECTRA["0.5"])
    v = model.v.clone()
    v[2, 1] = bad
    g = model.at(0, v=v)
    assert not g[2].isfinite().all()
    torch.testing.assert_close(g[:2], model.exact[:2], rtol=1e-3, atol=1e-3)
    assert not dpp.report_choice(model)
    model.at(1, v=2**16 * model.v)  # a scaled loss is as good
    assert model.chosen.step == 1


def test_samples_that_the_loss_does_not_depend_on_do_not_count():
    model = Linear(torch.cat([spectrum([0.97, 0.0, -0.9]), spectrum([0.1, 0.0, -0.1])]))
    v = model.v.clone()
    v[:6] = 0
    model.at(0, v=v)
    assert model.chosen.spec == "jfb"
    none = Linear(SPECTRA["0.5"])
    none.at(0, v=torch.zeros_like(none.v))
    assert not dpp.report_choice(none)  # nothing to judge by: the next step measures


@pytest.mark.parametrize("grad", ["guard('auto')", "schedule({0: 'jfb', 2: 'auto'})"])
def test_inside_strategies_made_of_others(grad):
    model, alone = Linear(SPECTRA["-1.4"], grad), Linear(SPECTRA["-1.4"])
    for step in range(2, 5):
        torch.testing.assert_close(model.at(step), alone.at(step))
    assert model.chosen.spec == alone.chosen.spec


def test_a_guard_acts_in_the_samples_that_failed():
    grad = "guard('auto', on_failure=\"fallback('jfb')\", forward_tol=0.05)"
    model = Linear(spectrum([0.5, 0.2, -0.4], samples=20), grad)
    state = model.solved(model.inject.detach())
    state[3] += 5
    with pytest.warns(dpp.ConvergenceWarning, match="forward solve"):
        g = model.at(0, state=state)
    torch.testing.assert_close(g[3], model.v[3])
    torch.testing.assert_close(g[4], model.exact[4], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_activation_checkpointing(reentrant):
    plain, saved = Net(f"auto(every={EVERY})"), Net(f"auto(every={EVERY})")
    forward = saved.forward
    saved.forward = lambda x: checkpoint(forward, x.requires_grad_(), use_reentrant=reentrant)
    want, got = train(plain, range(EVERY + 2)), train(saved, range(EVERY + 2))
    torch.testing.assert_close(got, want)
    first, second = (
        [(record.step, record.spec) for record in dpp.report_choice(model)]
        for model in (saved, plain)
    )
    assert first == second


def test_under_autocast():
    model = Net("auto")
    with torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("ignore", dpp.ConvergenceWarning)  # of the solve, in 16 bits
        train(model, range(3))
    record = dpp.report_choice(model)[-1]
    assert record.cosine >= 0.95
    plain = Net("auto")
    train(plain, range(3))
    assert abs(record.cost - dpp.report_choice(plain)[-1].cost) <= 4


def test_several_equilibria_choose_for_themselves():
    model = nn.Module()
    model.easy, model.hard = Linear(SPECTRA["0.5"]), Linear(SPECTRA["0.99"])
    dpp.set_step(model, 0)
    for part in (model.easy, model.hard):
        part.gradient()
    records = dpp.report_choice(model)
    assert [record.equilibrium for record in records] == ["easy", "hard"]
    assert records[0].cost < records[1].cost


def test_a_state_of_several_leaves_and_a_torchdeq_model():
    torchdeq = pytest.importorskip("torchdeq")
    with dpp.enabled("torchdeq"):
        torch.manual_seed(0)
        deq = torchdeq.get_deq(grad="auto", f_solver="anderson", f_tol=1e-5, f_max_iter=60)
        linear = nn.Linear(12, 12)
        nn.init.orthogonal_(linear.weight, 0.7)
        func = lambda a, b: (torch.tanh(linear(b)), torch.tanh(linear(a)) + 0.1)  # noqa: E731
        dpp.set_step(deq, 0)
        out, _ = deq(func, [torch.zeros(8, 12), torch.zeros(8, 12)])
        sum(z.square().mean() for z in out[-1]).backward()
        assert dpp.report_choice(deq)[-1].cosine >= 0.95


# --- loops --------------------------------------------------------------------------------------


def test_a_loop_whose_states_are_no_equilibrium_unrolls_and_keeps_its_value():
    torch.manual_seed(0)
    linear, memory = nn.Linear(12, 12), dpp.Memory()
    nn.init.orthogonal_(linear.weight, 0.9)
    x = torch.randn(8, 12)
    func = lambda h: torch.tanh(linear(h) + x)  # noqa: E731
    grad, start = "auto", torch.randn(8, 12) * 5
    with torch.no_grad():
        want = func(func(start))
    with pytest.warns(dpp.ConvergenceWarning, match="not at its equilibrium"):
        for step in range(3):
            memory.tell(step, None, 0)
            out = dpp.loop(func, start, 2, grad, dpp.Context(memory=memory, batch_dim=0))
            torch.testing.assert_close(out, want)
            out.square().sum().backward()
    assert dpp.report_choice(memory)[-1].spec == "upg(k=5, lam=1.0)"  # two, in a loop of two
    linear.zero_grad()
    dpp.loop(func, start, 2, grad, dpp.Context(memory=memory, batch_dim=0)).sum().backward()
    got = linear.weight.grad.clone()
    linear.zero_grad()
    func(func(start)).sum().backward()
    torch.testing.assert_close(got, linear.weight.grad)


def test_a_loop_that_arrives_is_judged():
    model = Net("auto", tol=None, max_iter=None, steps=60)
    train(model, range(3))
    assert dpp.report_choice(model)[-1].cosine >= 0.95


def test_copies_choose_for_themselves():
    model = Net("auto(every=1)")
    train(model, range(1))
    other = copy.deepcopy(model)
    train(other, range(1, 3))
    assert len(dpp.report_choice(model)) == 1
    assert len(dpp.report_choice(other)) == 2
