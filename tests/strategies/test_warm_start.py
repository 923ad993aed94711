"""`ift(warm_start=True)`: the adjoint of the last step as a first guess."""

from __future__ import annotations

import pytest
import torch
from torchdeq import get_deq

import deq_phantom_plugin as dpp
from deq_phantom_plugin.adjoint import SOLVERS, Linearization, solve
from deq_phantom_plugin.testing import NESTINGS, make_equilibrium

SPEC = "ift(warm_start=True, tol=1e-8, max_iter=100)"


def gradient(problem, spec, memory, batch_dim=0):
    """The gradient, and the products it took."""
    stats = []
    context = dpp.Context(memory=memory, monitor=stats.append, batch_dim=batch_dim)
    return problem.gradient(spec, context), stats[0].n_vjp


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_the_same_batch_again_takes_few_products(solver):
    problem = make_equilibrium([(3, 12)], norm=0.9)
    exact, memory = problem.gradient("exact"), dpp.Memory()
    spec = f"ift(solver={solver!r}, warm_start=True, tol=1e-8, max_iter=300)"
    first, cold = gradient(problem, spec, memory)
    with torch.no_grad():  # an optimiser's step
        problem.params[0].mul_(0.999)
        for _ in range(500):
            problem.state = problem.func(problem.state)
    second, warm = gradient(problem, spec, memory)
    plain, also_cold = gradient(problem, spec.replace("True", "False"), memory)
    torch.testing.assert_close(first, exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(second, problem.gradient("exact"), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(plain, second, rtol=1e-6, atol=1e-6)
    assert also_cold == pytest.approx(cold, abs=3)
    assert warm < 0.8 * also_cold


@pytest.mark.parametrize("nesting", NESTINGS, ids=lambda n: n[0])
@pytest.mark.parametrize("coupled", [False, True])
def test_states_of_any_structure(nesting, coupled):
    _, n, nest = nesting
    shapes = [(2, 3), (2, 2), (2, 2, 1)][:n]
    problem = make_equilibrium(shapes, nest, coupled=coupled)
    memory, batch_dim = dpp.Memory(), None if coupled else 0
    _, cold = gradient(problem, SPEC, memory, batch_dim)
    got, warm = gradient(problem, SPEC, memory, batch_dim)
    assert warm <= 3 < cold
    want = problem.gradient("ift(tol=1e-12, max_iter=200)", dpp.Context(batch_dim=batch_dim))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_off_by_default_nothing_is_kept():
    problem, memory = make_equilibrium([(3, 12)]), dpp.Memory()
    gradient(problem, "ift", memory)
    assert dpp.memory_state_dict(memory)[""]["warm_starts"] == {}
    gradient(problem, SPEC, memory)
    assert list(dpp.memory_state_dict(memory)[""]["warm_starts"]) == ["adjoint_0"]
    assert list(memory.state_dict()) == ["step"]


@pytest.mark.numerics
def test_a_guess_that_is_no_help_is_dropped_in_its_sample_only():
    problem = make_equilibrium([(3, 12)], norm=0.9)
    graph = Linearization(problem.func, problem.state)
    v = torch.linspace(-1, 2, 36, dtype=torch.float64).view(3, 12)
    options = {"solver": "gmres", "tol": 1e-10, "max_vjp": 100, "batch_dim": 0}
    (g,), cold = solve(graph.vjp, [v], **options)
    guess = g.clone()
    guess[1] = 1e6 * torch.randn(12, dtype=torch.float64)
    (got,), found = solve(graph.vjp, [v], start=[guess], **options)
    torch.testing.assert_close(got, g, rtol=1e-8, atol=1e-8)
    assert found.n_vjp <= cold.n_vjp + 2  # of the guess, and of what is left of it
    # The stated residual is the true one.
    (image,) = graph.vjp([got])
    residual = (v - got + image).norm(dim=1) / v.norm(dim=1)
    torch.testing.assert_close(found.residual, residual, rtol=0.1, atol=1e-14)


def test_a_batch_of_another_size_or_a_bad_memory_starts_cold():
    memory = dpp.Memory()
    for rows in (3, 2, 3):
        problem = make_equilibrium([(rows, 12)], norm=0.9)
        got, _ = gradient(problem, SPEC, memory)
        torch.testing.assert_close(got, problem.gradient("exact"), rtol=1e-6, atol=1e-6)
    memory.keep("adjoint_0", torch.full((3, 12), torch.nan))
    got, _ = gradient(problem, SPEC, memory)
    torch.testing.assert_close(got, problem.gradient("exact"), rtol=1e-6, atol=1e-6)


def test_an_overflow_passes_through_and_spoils_nothing():
    problem, memory = make_equilibrium([(3, 12)], norm=0.9), dpp.Memory()
    context = dpp.Context(memory=memory)
    for scale in (1.0, torch.inf, 1.0):
        attached = dpp.attach(problem.func, problem.state, SPEC, context)
        grads = torch.autograd.grad(problem.linear_loss(attached) * scale, problem.params)
        assert all(torch.isfinite(g).all() for g in grads) == (scale == 1.0)
    got = torch.cat([g.flatten() for g in grads])
    torch.testing.assert_close(got, problem.gradient("exact"), rtol=1e-6, atol=1e-6)


def test_saved_and_resumed_beside_the_model():
    problem = make_equilibrium([(3, 12)], norm=0.9)
    start = torch.zeros(3, 12, dtype=torch.float64)
    with dpp.enabled("torchdeq"):
        models = [get_deq(grad=SPEC, f_max_iter=200, f_tol=1e-12) for _ in range(2)]
        (state,), _ = models[0](problem.func, start)
        problem.linear_loss(state).backward()
        assert not any("adjoint_0" in key for key in models[0].state_dict())
        saved = dpp.memory_state_dict(models[0])
        assert "adjoint_0" in saved["grad_memory.0"]["warm_starts"]
        dpp.load_memory_state_dict(models[1], saved)
        counts = []
        for model in models:
            (state,), _ = model(problem.func, start, backward_writer=counts.append)
            problem.linear_loss(state).backward()
    assert counts[0]["nstep"].max() == counts[1]["nstep"].max() <= 3


def test_an_ignn_on_one_graph():
    pytest.importorskip("torch_geometric")
    from deq_phantom_plugin.adapters.ignn import IGNNConv

    torch.manual_seed(0)
    x, edges = torch.randn(60, 5), torch.randint(60, (2, 240))
    totals = {}
    for warm in (False, True):
        torch.manual_seed(1)
        conv = IGNNConv(5, 8, kappa=0.95, grad=f"ift(tol=1e-5, warm_start={warm})")
        optimizer, counts = torch.optim.SGD(conv.parameters(), 1e-3), []
        attach = dpp.IFT.attach

        def counted(self, func, state, context, attach=attach, counts=counts):
            monitored = dpp.Context(
                batch_dim=context.batch_dim,
                memory=context.memory,
                monitor=lambda stats: counts.append(stats.n_vjp),
            )
            return attach(self, func, state, monitored)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dpp.IFT, "attach", counted)
            for _ in range(10):
                optimizer.zero_grad()
                conv(x, edges).square().mean().backward()
                optimizer.step()
        totals[warm] = sum(counts[1:])
    assert totals[True] < totals[False]
