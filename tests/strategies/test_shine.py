"""SHINE: the forward solve's estimate in backward, its fallback and its refinement."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torchdeq import get_deq

import deq_phantom_plugin as dpp
from deq_phantom_plugin.adjoint import Linearization
from deq_phantom_plugin.forward import broyden
from deq_phantom_plugin.strategies import registry
from deq_phantom_plugin.testing import NESTINGS, make_equilibrium


def solved(problem, max_iter=60, tol=1e-12):
    """The context of a problem that our Broyden has solved."""
    start = torch.utils._pytree.tree_map(torch.zeros_like, problem.state)
    result = broyden(problem.func, start, max_iter=max_iter, tol=tol, keep_inverse=True)
    return dpp.Context(solver_result=result)


def error(got, want):
    return float((got - want).norm() / want.norm())


def test_the_gradient_is_that_of_the_estimate():
    problem = make_equilibrium([(3, 8)], norm=0.9)
    context = solved(problem)
    v = torch.linspace(-1, 2, 24, dtype=torch.float64).view(3, 8)
    (g,) = context.solver_result.inverse_jacobian.transposed([v])
    graph = Linearization(problem.func, problem.state)
    want = torch.autograd.grad(graph.outputs, problem.params, [g])
    got = problem.gradient("shine(fallback=None)", context)
    torch.testing.assert_close(got, torch.cat([x.flatten() for x in want]), rtol=1e-12, atol=1e-12)


def test_it_is_nearer_to_the_exact_gradient_than_jfb():
    for seed in range(5):
        problem = make_equilibrium([(4, 16)], norm=0.95, seed=seed)
        exact, context = problem.gradient("exact"), solved(problem)
        shine = error(problem.gradient("shine(fallback=None)", context), exact)
        assert shine < 0.9 * error(problem.gradient("jfb"), exact)


def test_a_sample_does_not_depend_on_the_others():
    # The injection of the first is tiny: it converges long before the others.
    torch.manual_seed(0)
    weight = torch.randn(20, 20, dtype=torch.float64)
    weight *= 0.95 / torch.linalg.matrix_norm(weight, 2)
    inject = torch.randn(4, 20, dtype=torch.float64)
    inject[0] *= 1e-4
    v = torch.randn(4, 20, dtype=torch.float64)

    def estimate(rows):
        func = lambda h: torch.tanh(h @ weight.mT + inject[rows])  # noqa: E731
        found = broyden(func, torch.zeros_like(inject[rows]), tol=1e-6, keep_inverse=True)
        return found.inverse_jacobian.transposed([v[rows]])[0]

    together = estimate(slice(None))
    for i in range(4):
        torch.testing.assert_close(together[i : i + 1], estimate(slice(i, i + 1)))


@pytest.mark.numerics
def test_refinement_goes_to_the_exact_gradient_and_faster_than_from_nothing():
    problem = make_equilibrium([(3, 16)], norm=0.9)
    exact, context = problem.gradient("exact"), solved(problem)
    errors = [
        error(problem.gradient(f"shine(refine={n}, fallback=None)", context), exact)
        for n in (0, 2, 5, 40)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-10
    with pytest.warns(dpp.ConvergenceWarning):
        cold = problem.gradient("ift(solver='broyden', max_iter=6, tol=1e-15)")
    assert errors[2] < error(cold, exact)


def test_the_cost_that_is_stated():
    problem = make_equilibrium([(3, 8)])
    for refine, n_vjp in ((0, 0), (4, 5)):
        stats = []
        context = solved(problem)
        context = dpp.Context(solver_result=context.solver_result, monitor=stats.append)
        problem.gradient(f"shine(refine={refine})", context)
        (stat,) = stats
        assert stat.n_vjp == n_vjp
        assert (stat.residual is None) == (refine == 0)


def test_samples_with_a_poor_estimate_fall_back_to_jfb():
    problem = make_equilibrium([(4, 8)], norm=0.9)
    context = solved(problem)
    inverse = context.solver_result.inverse_jacobian
    v = torch.linspace(-1, 2, 32, dtype=torch.float64).view(4, 8)
    ratio = inverse.transposed([v])[0].norm(dim=1) / v.norm(dim=1)
    limit = float(ratio.sort().values[1:3].mean())  # half of the samples are above
    graph = Linearization(problem.func, problem.state)
    g = torch.where((ratio <= limit)[:, None], inverse.transposed([v])[0], v)
    want = torch.autograd.grad(graph.outputs, problem.params, [g])
    got = problem.gradient(f"shine(fallback={limit!r})", context)
    torch.testing.assert_close(got, torch.cat([x.flatten() for x in want]), rtol=1e-12, atol=1e-12)
    assert error(problem.gradient("shine(fallback=1e-3)", context), problem.gradient("jfb")) == 0


def test_an_infinite_gradient_passes_through():
    problem = make_equilibrium([(3, 8)])
    for spec in ("shine", "shine(refine=2)"):
        attached = dpp.attach(problem.func, problem.state, spec, solved(problem))
        weight = torch.ones(3, 8, dtype=torch.float64)
        weight[1, 2] = torch.inf
        (attached * weight).sum().backward()
        inject = problem.params[1].grad
        assert not torch.isfinite(inject[1]).all()
        assert torch.isfinite(inject[[0, 2]]).all()
        for param in problem.params:
            param.grad = None


@pytest.mark.parametrize("nesting", NESTINGS[1:], ids=lambda n: n[0])
def test_nested_states(nesting):
    _, n, nest = nesting
    problem = make_equilibrium([(2, 3), (2, 2), (2, 2, 1)][:n], nest, norm=0.6)
    got = problem.gradient("shine(refine=40)", solved(problem))
    torch.testing.assert_close(got, problem.gradient("exact"), rtol=1e-8, atol=1e-9)


# --- in TorchDEQ ------------------------------------------------------------------------------


@pytest.mark.parametrize("core", ["sliced", "indexing"])
def test_with_torchdeq(core):
    problem = make_equilibrium([(3, 8)], norm=0.9)
    start = torch.zeros(3, 8, dtype=torch.float64)
    settings = {"core": core, "f_max_iter": 60, "f_tol": 1e-12}
    found = {}
    with dpp.enabled("torchdeq"):
        for spec in ("shine", "shine(refine=40)", "jfb"):
            deq = get_deq(f_solver="broyden_fast", grad=spec, **settings)
            (state,), info = deq(problem.func, start)
            grads = torch.autograd.grad(problem.linear_loss(state), problem.params)
            found[spec] = torch.cat([g.flatten() for g in grads])
            # Many vectors stand behind the estimate; what users keep does not hold them.
            assert getattr(info, "inverse_jacobian", None) is None
    exact = problem.gradient("exact")
    assert error(found["shine(refine=40)"], exact) < 1e-9
    assert error(found["shine"], exact) < error(found["jfb"], exact)


def test_two_scales_in_channels_last():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(4, 4, 3, padding=1, dtype=torch.float64)
    injection = torch.randn(2, 4, 6, 6, dtype=torch.float64)

    def func(a, b):
        up = torch.nn.functional.interpolate(b, scale_factor=2)
        down = torch.nn.functional.avg_pool2d(a, 2)
        return torch.tanh(0.5 * conv(a) + 0.3 * up + injection), torch.tanh(0.5 * conv(b) + down)

    start = [torch.zeros(2, 4, s, s, dtype=torch.float64) for s in (6, 3)]
    found = []
    with dpp.enabled("torchdeq"):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            for spec in ("shine(refine=60, fallback=None)", "ift(tol=1e-10)"):
                z = [x.contiguous(memory_format=memory_format) for x in start]
                deq = get_deq(f_solver="broyden_fast", grad=spec, f_max_iter=80, f_tol=1e-13)
                (state,), _ = deq(func, z)
                loss = sum(x.square().sum() for x in state)
                found.append(torch.autograd.grad(loss, conv.weight)[0])
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-7, atol=1e-8)


def test_a_forward_solve_without_an_estimate_is_refused_by_name():
    problem = make_equilibrium([(3, 8)])
    with pytest.raises(ValueError, match="broyden_fast"):
        problem.gradient("shine")
    other = dataclasses.replace(solved(problem), batch_dim=1)
    with pytest.raises(ValueError, match=r"batch_dim=1.*of samples along dimension 0"):
        problem.gradient("shine", other)


def test_nothing_is_kept_for_other_strategies_or_outside_training(monkeypatch):
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    problem = make_equilibrium([(3, 8)])
    seen = []

    @dpp.register_strategy("spy_on_result", replace=True)
    class Spy(dpp.JFB):
        def attach(self, func, equilibrium, context):
            seen.append(getattr(context.solver_result, "inverse_jacobian", None))
            return super().attach(func, equilibrium, context)

    with dpp.enabled("torchdeq"):
        deq = get_deq(f_solver="broyden_fast", grad="spy_on_result")
        deq(problem.func, torch.zeros(3, 8, dtype=torch.float64))
    assert seen == [None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("refine=-1", "refine=-1; expected a whole number of at least 0"),
        ("refine=1.5", "refine=1.5"),
        ("fallback=0", "fallback=0; expected a finite number above 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        dpp.get_strategy(f"shine({arguments})")


def test_reports_and_monitors_of_a_model_that_uses_it():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)
            self.deq = get_deq(grad="shine", f_solver="broyden_fast", f_max_iter=30)

        def forward(self, x):
            states, _ = self.deq(
                lambda h: torch.tanh(0.5 * self.linear(h) + x), torch.zeros_like(x)
            )
            return states[-1]

    seen = []
    with dpp.enabled("torchdeq"):
        model, x = Model(), torch.randn(4, 8)
        report = dpp.model_report(model, x, lambda out: out.square().mean(), ["shine", "jfb"])
        shine, jfb = report.reports[0].results
        assert 1 - shine.cosine < 1 - jfb.cosine
        with dpp.monitor(model, lambda numbers, step: seen.append(numbers), every=1):
            model(x).square().mean().backward()
    assert seen[0]["deq/cosine"] == pytest.approx(shine.cosine, abs=1e-3)


def test_refinement_whatever_the_layout_of_the_start():
    weight = (0.4 * torch.randn(3, 3, 3, 3, dtype=torch.float64)).requires_grad_()
    inject = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    func = lambda h: torch.tanh(  # noqa: E731
        0.5 * torch.nn.functional.conv2d(h, weight, padding=1) + inject
    )
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        start = torch.zeros(2, 3, 5, 5, dtype=torch.float64).contiguous(memory_format=layout)
        result = broyden(func, start, max_iter=40, tol=1e-6, keep_inverse=True)
        context = dpp.Context(solver_result=result)
        attached = dpp.attach(func, result.state.contiguous(), "shine(refine=3)", context)
        found.append(torch.autograd.grad(attached.square().sum(), weight)[0])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


def test_steps_that_were_not_taken_take_no_memory():
    problem = make_equilibrium([(3, 8)], norm=0.6)
    context = solved(problem, max_iter=500, tol=1e-6)
    estimate = context.solver_result.inverse_jacobian.estimate
    tensors = [x for x in vars(estimate._memory).values() if isinstance(x, torch.Tensor)]
    steps, system = estimate._memory.steps, estimate._memory.system
    assert any(x is steps for x in tensors)
    assert any(x is system for x in tensors)
    n = 100  # more than are taken
    numbers = n * 3 * 8 + n * n * 3 + 2 * n * 3 + n * 3 + 100
    assert len(steps) < n
    assert sum(x.untyped_storage().nbytes() for x in tensors) < 8 * numbers
    problem.gradient("shine", context)


def test_limited_memory_is_refused():
    problem = make_equilibrium([(3, 8)])
    with dpp.enabled("torchdeq"):
        deq = get_deq(f_solver="broyden_fast", grad="shine")
        start = torch.zeros(3, 8, dtype=torch.float64)
        with pytest.raises(ValueError, match="LBFGS_thres"):
            deq(problem.func, start, solver_kwargs={"LBFGS_thres": 5})


# --- where it does not fit ---------------------------------------------------------------------

LATER = ["shine", "guard('shine')", "schedule({0: 'jfb', 20000: 'shine'})"]
LATER += [
    "schedule({0: 'jfb', 9: \"guard('shine')\"})",
    "ramp('shine', {'refine': (0, 2)}, until=9)",
]


@pytest.mark.parametrize("spec", LATER)
@pytest.mark.parametrize("solver", ["anderson", "broyden", "fixed_point_iter", "anderson_fast"])
def test_torchdeq_refuses_it_for_a_solver_without_an_estimate(spec, solver):
    torchdeq = pytest.importorskip("torchdeq")
    with dpp.enabled("torchdeq"):
        with pytest.raises(ValueError, match=r"shine.*the f_solver .* has none to share"):
            torchdeq.get_deq(grad=spec, f_solver=solver)
        deq = torchdeq.get_deq(grad="upg", f_solver=solver)
        entries = deq.produce_grad
        with pytest.raises(ValueError, match="none to share"):
            dpp.set_grad(deq, spec)
        assert deq.produce_grad is entries
        assert dpp.set_grad(torchdeq.get_deq(grad="upg", f_solver="broyden_fast"), spec) == 1


@pytest.mark.parametrize("spec", LATER)
def test_an_equilibrium_refuses_it_for_a_solver_without_an_estimate(spec):
    for settings in ({"solver": "anderson"}, {"solver": "fixed_point"}, {"steps": 4}):
        with pytest.raises(ValueError, match="none to share"):
            dpp.Equilibrium(grad=spec, **settings)
        equilibrium = dpp.Equilibrium(grad="upg", **settings)
        with pytest.raises(ValueError, match="none to share"):
            dpp.set_grad(equilibrium, spec)
        assert isinstance(equilibrium.grad, dpp.UPG)
    dpp.Equilibrium(grad=spec, solver="broyden")
    dpp.Equilibrium(grad=spec, solver=lambda func, start: start)  # of which nobody knows


def test_who_can_do_without_is_not_refused():
    class Uses(dpp.GradStrategy):
        wants_inverse_jacobian = True

        def attach(self, func, equilibrium, context):
            return func(equilibrium)

    dpp.Equilibrium(grad=Uses(), solver="anderson")
    dpp.Equilibrium(grad="auto(methods=['jfb', 'upg'])", solver="anderson")


def test_the_solver_that_acts_counts_and_not_its_name():
    torchdeq = pytest.importorskip("torchdeq")
    from torchdeq.core import DEQSliced
    from torchdeq.solver import get_solver

    with dpp.enabled("torchdeq"):
        assert dpp.set_grad(DEQSliced(f_solver="broyden_fast"), "shine") == 1
        deq = torchdeq.get_deq(grad="upg")
        deq.f_solver = get_solver("broyden_fast")
        assert dpp.set_grad(deq, "shine") == 1
        deq.f_solver = get_solver("anderson")
        with pytest.raises(ValueError, match="none to share"):
            dpp.set_grad(deq, "shine")


def test_a_fallback_has_the_estimate_too():
    spec = "guard('ift(max_iter=1)', on_failure=\"fallback('shine')\", adjoint_tol=1e-12)"
    with pytest.raises(ValueError, match="none to share"):
        dpp.Equilibrium("anderson", spec)
    with pytest.raises(ValueError, match="none to share"):
        dpp.Equilibrium("anderson", "auto(methods=['jfb', 'shine'])")
    problem = make_equilibrium([(3, 8)])
    equilibrium = dpp.Equilibrium("broyden", spec, tol=1e-8)
    with pytest.warns(dpp.ConvergenceWarning, match="which get the gradient of shine"):
        h = equilibrium(problem.func, torch.zeros(3, 8, dtype=torch.float64))
        h.sum().backward()


def test_where_others_solve_it_is_refused_as_well():
    from deq_phantom_plugin.adapters.ignn import IGNNConv
    from deq_phantom_plugin.patching import Equilibrium

    for spec in LATER:
        with pytest.raises(ValueError, match="a patched repository has none to share"):
            Equilibrium(spec)
        with pytest.raises(ValueError, match="IGNN has none to share"):
            IGNNConv(4, 4, grad=spec)
