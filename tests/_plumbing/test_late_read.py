"""Where reading a number would mean waiting for the device, iterations go on one step longer.

There is no such device here: reading late is forced on the CPU.
"""

from __future__ import annotations

import pytest
import torch

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.late_read import LateRead
from deq_phantom_plugin.adjoint import SOLVERS, Linearization, solve
from deq_phantom_plugin.forward import anderson, broyden, fixed_point
from deq_phantom_plugin.testing import make_equilibrium

CPU = torch.device("cpu")


@pytest.fixture
def late(monkeypatch):
    monkeypatch.setattr(LateRead, "is_late", staticmethod(lambda device: True))


def test_numbers_come_at_once_on_the_cpu():
    reader = LateRead(CPU)
    assert [reader.read(torch.tensor(i)) for i in range(3)] == [0, 1, 2]
    assert reader.last() is None


def test_numbers_come_one_call_late_elsewhere(late):
    reader = LateRead(CPU)
    assert [reader.read(torch.tensor([i, i])) for i in range(3)] == [None, [0, 0], [1, 1]]
    assert reader.last() == [2, 2]
    assert reader.last() is None


def test_what_is_read_late_is_what_it_was(late):
    reader, number = LateRead(CPU), torch.tensor(1)
    reader.read(number)
    number.fill_(5)
    assert reader.read(number) == 1


def adjoint(problem, solver, tol, max_vjp=100):
    graph = Linearization(problem.func, problem.state)
    v = [torch.linspace(-1, 2, problem.state.numel(), dtype=torch.float64).view_as(problem.state)]
    (g,), solution = solve(graph.vjp, v, solver=solver, tol=tol, max_vjp=max_vjp, batch_dim=0)
    residual = (v[0] - g + graph.vjp([g])[0]).norm(dim=1) / v[0].norm(dim=1)
    return g, solution, residual


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_adjoint_solvers_take_a_product_more_at_most_two(solver, monkeypatch):
    problem = make_equilibrium([(5, 12)], norm=0.8)
    g, at_once, _ = adjoint(problem, solver, 1e-7)
    monkeypatch.setattr(LateRead, "is_late", staticmethod(lambda device: True))
    got, late, residual = adjoint(problem, solver, 1e-7)
    assert at_once.converged
    assert late.converged
    assert (residual <= 1.01e-7).all()
    # bicgstab takes two an iteration.
    assert at_once.n_vjp < late.n_vjp <= at_once.n_vjp + 2
    torch.testing.assert_close(got, g, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(late.residual, residual, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("max_vjp", [1, 2, 3, 4, 7])
def test_adjoint_solvers_that_run_out_say_so(solver, max_vjp, late):
    problem = make_equilibrium([(5, 12)], norm=0.95)
    _, solution, residual = adjoint(problem, solver, 1e-12, max_vjp)
    assert not solution.converged
    assert solution.n_vjp <= max_vjp
    torch.testing.assert_close(solution.residual, residual, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("max_vjp", [1, 2, 3, 20])
def test_a_nan_is_never_overlooked(solver, max_vjp, late):
    def vjp(g):
        return [torch.full_like(leaf, torch.nan) for leaf in g]

    v = [torch.ones(3, 4)]
    with pytest.raises(dpp.NonFiniteError, match="in 3 of 3 samples"):
        solve(vjp, v, solver=solver, tol=1e-6, max_vjp=max_vjp, batch_dim=0)


@pytest.mark.parametrize("solver", [anderson, broyden, fixed_point])
def test_forward_solvers_take_an_evaluation_more(solver, monkeypatch):
    problem = make_equilibrium([(5, 12)], norm=0.8)
    start = torch.zeros_like(problem.state)

    def run():
        calls = []
        found = solver(lambda h: calls.append(1) or problem.func(h), start, max_iter=80, tol=1e-8)
        return found, len(calls)

    at_once, n = run()
    monkeypatch.setattr(LateRead, "is_late", staticmethod(lambda device: True))
    late, more = run()
    assert more == n + 1
    assert (late.abs_lowest < 1e-8).all()
    torch.testing.assert_close(late.state, at_once.state, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("every", [1, 3])
def test_what_was_learned_before_a_nan_is_kept(every, monkeypatch):
    """A sample that diverges: its estimate is that of the steps before, whenever one looks."""
    problem, found = make_equilibrium([(4, 12)], norm=0.9), []
    for late, looks in ((False, 1), (True, every)):
        monkeypatch.setattr(LateRead, "is_late", staticmethod(lambda device, late=late: late))
        calls = []

        def func(h, calls=calls):
            calls.append(1)
            image = problem.func(h)
            image[1] += torch.nan if len(calls) > 5 else 0.0
            return image

        start = torch.zeros_like(problem.state)
        options = {"max_iter": 9, "tol": 0.0, "keep_inverse": True, "check_every": looks}
        solution = broyden(func, start, **options)
        found += solution.inverse_jacobian.transposed([torch.ones_like(start)])
    assert found[0].isfinite().all()
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)
