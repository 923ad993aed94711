"""A state that is no equilibrium of F: said where a gradient takes it for one."""

from __future__ import annotations

import warnings

import pytest
import torch

import deq_phantom_plugin as dpp
from deq_phantom_plugin.contract.errors import AssumptionWarning

ASSUME = ["ift", "exact", "npg(lam='adaptive')", "npg(clip=1.0)", "schedule({0: 'ift'})"]
JUDGE = ["guard('ift')", "auto"]
SILENT = ["upg", "upg(lam='adaptive')", "tbptt", "bptt", "jfb", "npg"]


class Map:
    """tanh(W h + u), a strong contraction."""

    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(6, 6, generator=generator, dtype=torch.float64)
        self.weight = (0.3 * weight / torch.linalg.matrix_norm(weight, 2)).requires_grad_()
        self.inject = torch.randn(4, 6, generator=generator, dtype=torch.float64)

    def __call__(self, h):
        return torch.tanh(h @ self.weight + self.inject)

    def after(self, steps):
        """Return the state after so many steps from zero."""
        h = torch.zeros_like(self.inject)
        with torch.no_grad():
            for _ in range(steps):
                h = self(h)
        return h


def said(func, state, spec, **told):
    """Return what `attach` warns of h = F(h)."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        context = dpp.Context(step=0, memory=dpp.Memory(), **told)
        dpp.attach(func, state, spec, context).sum().backward()
    return [str(w.message) for w in given if "no equilibrium" in str(w.message)]


@pytest.mark.parametrize("spec", ASSUME)
def test_it_is_said_of_another_map_and_of_a_solve_that_stopped_short(spec):
    func, other = Map(), Map(seed=1)
    assert said(func, func.after(60), spec) == []
    (text,) = said(other, func.after(60), spec)
    h = func.after(60)
    apart = (torch.linalg.vector_norm(other(h) - h) / torch.linalg.vector_norm(h)).item()
    largest = max(1.0, (torch.linalg.vector_norm(other(h)) / torch.linalg.vector_norm(h)).item())
    assert f"differs from h by {apart / largest:.0%} of its size" in text
    assert said(func, func.after(1), spec)


@pytest.mark.parametrize("spec", JUDGE)
def test_who_looks_at_it_says_it_in_other_words(spec):
    func, other = Map(), Map(seed=1)
    with pytest.warns(dpp.ConvergenceWarning):
        assert said(other, func.after(60), spec) == []
        context = dpp.Context(step=0, memory=dpp.Memory())
        dpp.attach(other, func.after(60), spec, context).sum().backward()


@pytest.mark.parametrize("spec", SILENT)
def test_nothing_is_said_of_who_unrolls_or_does_not_ask(spec):
    func, other = Map(), Map(seed=1)
    assert said(other, func.after(60), spec) == []


def test_whoever_says_what_samples_are_is_not_asked():
    func, other = Map(), Map(seed=1)
    assert said(other, func.after(60), "ift", batch_dim=0) == []


def test_it_is_said_once_and_costs_no_evaluation():
    calls = 0
    func, memory = Map(), dpp.Memory()

    def counted(h):
        nonlocal calls
        calls += 1
        return func(h)

    def cost(state):
        nonlocal calls
        calls = 0
        dpp.attach(counted, state, "ift", dpp.Context(memory=dpp.Memory())).sum().backward()
        return calls

    # Two of the question whether samples depend on one another, and one of `ift`.
    assert cost(func.after(60)) == 3
    with pytest.warns(AssumptionWarning, match="no equilibrium of F"):
        assert cost(func.after(1)) == 3
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        for _ in range(3):
            dpp.attach(func, func.after(1), "ift", dpp.Context(memory=memory)).sum().backward()
    assert len(given) == 1


def test_a_strategy_of_ones_own_says_whether_it_assumes_it():
    class Assumes(dpp.GradStrategy):
        def attach(self, func, equilibrium, context):
            return func(equilibrium)

    class Looks(Assumes):
        assumes_equilibrium = False

    func, other = Map(), Map(seed=1)
    assert said(other, func.after(60), Assumes())
    assert said(other, func.after(60), Looks()) == []


def test_torchdeq_whose_solve_stops_at_its_start():
    torchdeq = pytest.importorskip("torchdeq")
    dpp.enable("torchdeq")
    func = Map()
    deq = torchdeq.get_deq(grad="ift", f_solver="fixed_point_iter", f_max_iter=1)
    with pytest.warns(AssumptionWarning, match="no equilibrium of F"):
        states, _ = deq(func, torch.zeros_like(func.inject))
    assert states[-1].requires_grad
