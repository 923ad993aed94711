"""NPG-RR: mean, variance, cost and manners of the series cut at random."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves, tree_map

import deq_phantom_plugin as dpp
from conftest import equilibria
from deq_phantom_plugin.strategies import npg_rr
from deq_phantom_plugin.testing import NESTINGS, make_equilibrium


def force(monkeypatch, terms):
    """Let the next draws be `terms`."""
    draws = iter(terms)
    monkeypatch.setattr(npg_rr, "draw_terms", lambda p: next(draws))


def enough(*rates: float, tol: float = 1e-10) -> int:
    """The K beyond which what falls at these rates is negligible."""
    return math.ceil(math.log(tol) / math.log(max(rates)))


def estimates(problem, spec, monkeypatch, n, context=None):
    """The estimate for each K = 1 ... n, shape (n, parameters)."""
    force(monkeypatch, range(1, n + 1))
    return torch.stack([problem.gradient(spec, context) for _ in range(n)])


def probabilities(p: float, n: int) -> torch.Tensor:
    return (1 - p) * p ** torch.arange(n, dtype=torch.float64)


def terms(problem, lam: float, n: int) -> torch.Tensor:
    """(dF/dz)^T x_t for t < n with x_t = lam B^t v, from differences of NPG's partial sums."""
    sums = torch.stack([problem.gradient(dpp.NPG(k, lam)) for k in range(1, n + 1)])
    return sums.diff(dim=0, prepend=torch.zeros_like(sums[:1]))


def variance(x: torch.Tensor, p: float) -> float:
    """The docstring's sum over s and t."""
    t = torch.arange(len(x), dtype=torch.float64)
    weights = p ** -torch.minimum(t[:, None], t) - 1
    return float((weights * (x @ x.mT)).sum())


# --- mean and variance ------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "lam"), [(0.5, 1.0), (0.8, 0.5), (0.7, "adaptive")])
def test_mean_over_all_k_is_the_exact_gradient(p, lam, monkeypatch):
    problem = make_equilibrium([(3, 2), (3, 2, 2)], list, norm=0.6)
    # The probability of K falls as p^K, the terms as ||B||^K.
    n = enough(p, 0.6 if lam == "adaptive" else 1 - 0.4 * lam)
    all_k = estimates(problem, dpp.NPGRR(p, lam), monkeypatch, n)
    mean = probabilities(p, n) @ all_k
    exact = problem.gradient("exact")
    assert torch.linalg.vector_norm(mean - exact) < 1e-8 * torch.linalg.vector_norm(exact)


@given(drawn=equilibria(), p=st.floats(0.3, 0.95), lam=st.floats(0.4, 1.0))
def test_mean_over_all_k_on_any_contraction(drawn, p, lam):
    problem, context = drawn
    n = 20
    with pytest.MonkeyPatch.context() as monkeypatch:
        all_k = estimates(problem, dpp.NPGRR(p, lam), monkeypatch, n, context)
    # With every K > n taken for n, the mean is that of the first n terms.
    mean = probabilities(p, n) @ all_k + p**n * all_k[-1]
    cut = problem.gradient(dpp.NPG(n, lam), context)
    torch.testing.assert_close(mean, cut, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("p", "lam"), [(0.5, 1.0), (0.8, 0.5)])
def test_variance_over_all_k_is_the_closed_form(p, lam, monkeypatch):
    problem = make_equilibrium([(3, 4)], norm=0.5)
    n = enough(p, (1 - 0.5 * lam) ** 2 / p)
    all_k = estimates(problem, dpp.NPGRR(p, lam), monkeypatch, n)
    weights = probabilities(p, n)
    mean = weights @ all_k
    got = float(weights @ (all_k - mean).square().sum(1))
    assert got == pytest.approx(variance(terms(problem, lam, n), p), rel=1e-8)


def test_mean_and_variance_of_samples():
    problem = make_equilibrium([(2, 3)], norm=0.5)
    p, lam, n = 0.8, 0.7, 3000
    exact = problem.gradient("exact")
    sampled = torch.stack([problem.gradient(dpp.NPGRR(p, lam)) for _ in range(n)])
    closed = variance(terms(problem, lam, 80), p)
    error = torch.linalg.vector_norm(sampled.mean(0) - exact)
    assert error < 5 * math.sqrt(closed / n)
    deviations = (sampled - exact).square().sum(1)
    standard_error = float(deviations.std()) / math.sqrt(n)
    assert abs(float(deviations.mean()) - closed) < 5 * standard_error
    assert standard_error < 0.1 * closed  # so that this says something


def test_draws_are_geometric_and_reproducible():
    p, n = 0.7, 20_000
    torch.manual_seed(5)
    drawn = torch.tensor([npg_rr.draw_terms(p) for _ in range(n)])
    torch.manual_seed(5)
    assert [npg_rr.draw_terms(p) for _ in range(50)] == drawn[:50].tolist()
    assert drawn.min() == 1
    for t in range(12):
        want = p**t
        spread = math.sqrt(want * (1 - want) / n)
        assert abs(float((drawn > t).double().mean()) - want) <= 5 * spread
    for extreme in (1e-300, 1 - 1e-9):
        assert npg_rr.draw_terms(extreme) >= 1


# --- each estimate ----------------------------------------------------------------------------


@given(drawn=equilibria(), k=st.integers(1, 8), p=st.floats(0.3, 0.95), lam=st.floats(0.1, 1))
def test_the_estimate_for_k_is_the_weighted_sum(drawn, k, p, lam):
    problem, context = drawn
    with pytest.MonkeyPatch.context() as monkeypatch:
        force(monkeypatch, [k])
        got = problem.gradient(dpp.NPGRR(p, lam), context)
    weights = p ** -torch.arange(k, dtype=torch.float64)
    want = weights @ terms(problem, lam, k)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_cost():
    """K - 1 products, which the monitor is told, and p / (1 - p) in the mean."""
    problem = make_equilibrium([(2, 3)])
    calls, reports = [], []

    def func(h):
        out = problem.func(h)
        out.register_hook(lambda grad: calls.append(1))
        return out

    context = dpp.Context(monitor=reports.append)
    counts = []
    for _ in range(1000):
        calls.clear()
        dpp.attach(func, problem.state, "npg_rr(p=0.75)", context).sum().backward()
        assert len(calls) == reports[-1].n_vjp + 1  # and the backward pass itself
        counts.append(reports[-1].n_vjp)
    assert reports[0].strategy == "npg_rr(p=0.75, lam=0.5)"
    spread = math.sqrt(0.75) / 0.25 / math.sqrt(len(counts))
    assert abs(sum(counts) / len(counts) - 3) < 5 * spread


def test_one_draw_a_backward_pass():
    problem = make_equilibrium([(2, 3)])
    before = torch.get_rng_state()
    loss = problem.probe(dpp.attach(problem.func, problem.state, grad="npg_rr"))
    assert torch.equal(torch.get_rng_state(), before)
    draw = lambda: torch.autograd.grad(loss, problem.params, retain_graph=True)  # noqa: E731
    assert any(not torch.equal(draw()[0], draw()[0]) for _ in range(5))


def test_value_is_the_equilibrium_in_tensors_of_its_own():
    problem = make_equilibrium([(2, 3), (2, 2), (2, 2, 1)], NESTINGS[-1][2])
    before = tree_map(torch.clone, problem.state)
    attached = dpp.attach(problem.func, problem.state, grad="npg_rr")
    for got, want in zip(tree_leaves(attached), tree_leaves(before), strict=True):
        assert torch.equal(got, want)
        got.relu_()
    problem.probe(attached).backward()
    for now, then in zip(tree_leaves(problem.state), tree_leaves(before), strict=True):
        assert torch.equal(now, then)


def test_second_derivatives_are_refused():
    problem = make_equilibrium([(2, 3)])
    attached = dpp.attach(problem.func, problem.state, grad="npg_rr")
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(attached.sum(), problem.params, create_graph=True)


# --- declarative ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("npg_rr(p=0)", r"p=0; expected a number in \(0, 1\)"),
        ("npg_rr(p=1)", "p=1; expected"),
        ("npg_rr(p='half')", "p='half'"),
        ("npg_rr(p=True)", "p=True"),
        ("npg_rr(lam=1.5)", "lam=1.5"),
    ],
)
def test_arguments_out_of_range(spec, match):
    with pytest.raises(ValueError, match=match):
        dpp.get_strategy(spec)


def test_p_nan_is_refused():
    with pytest.raises(ValueError, match="p=nan"):
        dpp.NPGRR(p=float("nan"))
