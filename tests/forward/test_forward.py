"""Forward solvers: TorchDEQ's iterates, samples that stop on their own, states of any structure."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from torch.utils._pytree import tree_leaves, tree_map
from torchdeq import get_deq
from torchdeq.core import DEQBase
from torchdeq.solver import get_solver

import deq_phantom_plugin as dpp
from conftest import equilibria, evaluate
from deq_phantom_plugin.adjoint.inverse_estimate import InverseEstimate
from deq_phantom_plugin.forward import anderson, broyden, fixed_point
from deq_phantom_plugin.testing import make_equilibrium

NAMES = {
    "anderson": "anderson_fast",
    "broyden": "broyden_fast",
    "fixed_point_iter": "fixed_point_fast",
}
SOLVERS = [anderson, broyden, fixed_point]


def two_scales(dtype=torch.float64, memory_format=torch.contiguous_format):
    """A convolutional map on two scales, and where it starts."""
    torch.manual_seed(1)
    fine = torch.nn.Conv2d(4, 4, 3, padding=1, dtype=dtype)
    coarse = torch.nn.Conv2d(4, 4, 3, padding=1, dtype=dtype)
    injection = torch.randn(5, 4, 8, 8, dtype=dtype)
    seen = []

    def func(a, b):
        seen.append([x.is_contiguous(memory_format=memory_format) for x in (a, b)])
        up = torch.nn.functional.interpolate(b, scale_factor=2)
        return [
            torch.tanh(0.8 * fine(a) + 0.4 * up + injection),
            torch.tanh(0.8 * coarse(b) + 0.4 * torch.nn.functional.avg_pool2d(a, 2)),
        ]

    start = [
        torch.zeros(5, 4, size, size, dtype=dtype).contiguous(memory_format=memory_format)
        for size in (8, 4)
    ]
    return func, start, seen


def solve(solver, func, start, **settings):
    with dpp.enabled("torchdeq"):
        deq = get_deq(f_solver=solver, **settings).eval()
        with torch.no_grad():
            states, info = deq(func, start)
    return tree_leaves(states[-1]), info


@pytest.mark.parametrize("stop_mode", ["abs", "rel"])
@pytest.mark.parametrize("form", ["tensor", "list"])
@pytest.mark.parametrize("solver", sorted(NAMES))
def test_the_iterates_are_torchdeqs(solver, form, stop_mode):
    if form == "tensor":
        problem = make_equilibrium([(4, 30)], norm=0.95)
        func, start = problem.func, torch.zeros(4, 30, dtype=torch.float64)
    else:
        func, start, _ = two_scales()
    for steps in (4, 9, 20):
        settings = {"f_max_iter": steps, "f_tol": 0.0, "f_stop_mode": stop_mode}
        theirs, expected = solve(solver, func, start, **settings)
        ours, info = solve(NAMES[solver], func, start, **settings)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        assert set(info) == set(expected)
        for name in ("abs_lowest", "rel_lowest", "abs_trace", "rel_trace", "nstep"):
            assert info[name].shape == expected[name].shape
            torch.testing.assert_close(
                info[name], expected[name].to(info[name].dtype), rtol=1e-4, atol=1e-12
            )


@pytest.mark.parametrize("solver", sorted(NAMES))
def test_options_of_torchdeqs_solvers(solver):
    func, start, _ = two_scales()
    flat = torch.cat([x.flatten(1) for x in start], dim=1)

    def on_flat(z):
        a, b = z.split([256, 64], dim=1)
        return torch.cat([x.flatten(1) for x in func(a.view(5, 4, 8, 8), b.view(5, 4, 4, 4))], 1)

    options = {
        "anderson": {"m": 3, "lam": 1e-3, "tau": 0.7},
        "broyden": {},
        "fixed_point_iter": {"tau": 0.6},
    }[solver]
    common = {"max_iter": 12, "tol": 0.0, "indexing": [5, 8, 12], **options}
    with dpp.enabled("torchdeq"), torch.no_grad():
        for final in (False, True):
            one = get_solver(solver)(on_flat, flat, return_final=final, **common)
            two = get_solver(NAMES[solver])(on_flat, flat, return_final=final, **common)
            torch.testing.assert_close(two[0], one[0], rtol=1e-9, atol=1e-11)
            assert len(two[1]) == len(one[1]) > 0
            for a, b in zip(two[1], one[1], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.numerics
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_that_has_converged_stops(solver):
    # The injection of the first samples is tiny: they converge long before the others.
    torch.manual_seed(0)
    weight = torch.randn(40, 40, dtype=torch.float64)
    weight *= 0.97 / torch.linalg.matrix_norm(weight, 2)
    inject = torch.randn(8, 40, dtype=torch.float64)
    inject[:6] *= 1e-4
    batches = []

    def func(h):
        batches.append(len(h))
        return torch.tanh(h @ weight.mT + inject)

    together = solver(func, torch.zeros(8, 40, dtype=torch.float64), max_iter=60, tol=1e-6)
    assert (together.abs_lowest < 1e-6).all()
    assert set(batches) == {8}  # F sees the whole batch
    alone = []
    for i in range(8):
        one = lambda h, i=i: torch.tanh(h @ weight.mT + inject[i : i + 1])  # noqa: E731
        alone.append(solver(one, torch.zeros(1, 40, dtype=torch.float64), max_iter=60, tol=1e-6))
    steps = torch.cat([solution.n_steps for solution in alone])
    assert steps[:6].max() < steps[6:].min()
    if solver is not fixed_point:  # which has no linear algebra that could be left
        torch.testing.assert_close(together.n_steps, steps)
        got = torch.cat([solution.state for solution in alone])
        torch.testing.assert_close(together.state, got, rtol=1e-9, atol=1e-12)


@pytest.mark.numerics
def test_broydens_linear_algebra_shrinks_with_the_batch(monkeypatch):
    held = []
    step = InverseEstimate.step
    monkeypatch.setattr(
        InverseEstimate,
        "step",
        lambda self, active: held.append(len(self.room)) or step(self, active),
    )
    scale = torch.tensor([1e-5] * 6 + [1.0] * 2, dtype=torch.float64)[:, None]
    weight = torch.randn(20, 20, dtype=torch.float64)
    weight *= 0.97 / torch.linalg.matrix_norm(weight, 2)
    inject = torch.randn(8, 20, dtype=torch.float64) * scale
    func = lambda h: torch.tanh(h @ weight.mT + inject)  # noqa: E731
    broyden(func, torch.zeros_like(inject), max_iter=60, tol=1e-5)
    assert held[0] == 8
    assert held[-1] <= 2
    held.clear()
    broyden(func, torch.zeros_like(inject), max_iter=60, tol=1e-5, keep_inverse=True)
    assert set(held) == {8}


@given(equilibria(coupled=False))
def test_any_state(drawn):
    problem, _ = drawn
    start = tree_map(torch.zeros_like, problem.state)
    for solver in SOLVERS:
        solution = solver(problem.func, start, max_iter=300, tol=1e-10)
        got, want = tree_leaves(solution.state), tree_leaves(problem.state)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)
        assert solution.abs_lowest.shape == (len(want[0]) if want[0].dim() else 1,)


@pytest.mark.parametrize("solver", SOLVERS)
def test_samples_that_diverge_leave_the_others_alone(solver):
    gain = torch.tensor([0.5, 1e200, 0.4, 0.3], dtype=torch.float64)[:, None]
    func = lambda h: gain * h.square() + 0.1  # noqa: E731
    solution = solver(func, torch.zeros(4, 3, dtype=torch.float64), max_iter=80, tol=1e-9)
    assert torch.isfinite(solution.state).all()
    assert (solution.abs_lowest[[0, 2, 3]] < 1e-9).all()
    assert solution.abs_lowest[1] > 1e-9


def test_scalars_and_vectors_as_torchdeq_takes_them():
    func = lambda z: torch.cos(z)  # noqa: E731
    for start in (torch.tensor(0.3), torch.full((3,), 0.3)):
        for solver in SOLVERS:
            solution = solver(func, start, max_iter=60, tol=1e-6)
            assert solution.state.shape == start.shape
            torch.testing.assert_close(solution.state, torch.full_like(start, 0.7390851))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("solver", sorted(NAMES.values()))
def test_scales_keep_their_memory_format(solver, memory_format):
    func, start, seen = two_scales(torch.float32, memory_format)
    states, _ = solve(solver, func, start, f_max_iter=10)
    assert seen
    assert all(all(each) for each in seen[1:])
    for state, first in zip(states, start, strict=True):
        assert state.shape == first.shape


@pytest.mark.parametrize("grad", [5, "upg", "ift", "npg"])
@pytest.mark.parametrize("core", ["sliced", "indexing"])
def test_gradients_behind_a_fast_solve(core, grad):
    problem = make_equilibrium([(3, 6)], norm=0.6)
    start = torch.zeros(3, 6, dtype=torch.float64)
    found = []
    with dpp.enabled("torchdeq"):
        for solver in ("broyden", "broyden_fast"):
            deq = get_deq(
                core=core, f_solver=solver, f_max_iter=12, f_tol=0.0, grad=grad, n_states=2
            )
            states, _ = deq(problem.func, start)
            assert len(states) == 2
            loss = sum(problem.probe(state) for state in states)
            found.append(torch.autograd.grad(loss, problem.params))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_they_solve_torchdeqs_own_backward_pass_too():
    problem = make_equilibrium([(3, 6)], norm=0.6)
    start = torch.zeros(3, 6, dtype=torch.float64)
    settings = {"f_max_iter": 60, "f_tol": 1e-13, "b_max_iter": 60, "b_tol": 1e-12, "ift": True}
    with dpp.enabled("torchdeq"):
        for solver in NAMES.values():
            deq = get_deq(f_solver=solver, b_solver=solver, **settings)
            (state,), _ = deq(problem.func, start)
            got = torch.autograd.grad(problem.linear_loss(state), problem.params)
            got = torch.cat([g.flatten() for g in got])
            torch.testing.assert_close(got, problem.gradient("exact"), rtol=1e-8, atol=1e-9)


def test_the_table_is_torchdeqs_again_after_disable():
    from torchdeq import solver as table

    before = dict(table._solvers)
    dpp.enable("torchdeq")
    assert set(NAMES.values()) <= set(table._solvers)
    assert {name: table._solvers[name] for name in before} == before
    dpp.disable("torchdeq")
    assert table._solvers == before


@torch.no_grad()
def test_a_model_made_while_enabled_still_solves_after_disable():
    problem = make_equilibrium([(3, 6)], norm=0.6)
    with dpp.enabled("torchdeq"):
        deq = get_deq(f_solver="broyden_fast", f_max_iter=40, f_tol=1e-10)
    assert isinstance(deq, DEQBase)
    (state,), _ = deq.eval()(problem.func, torch.zeros(3, 6, dtype=torch.float64))
    torch.testing.assert_close(state, problem.state, rtol=1e-8, atol=1e-9)


def test_bad_options_are_refused_by_name():
    func, start = torch.cos, torch.zeros(2, 3)
    for solver in SOLVERS:
        with pytest.raises(ValueError, match="stop_mode='relative'"):
            solver(func, start, stop_mode="relative")
    with pytest.raises(ValueError, match="m=1"):
        anderson(func, start, m=1)
    for solver in (broyden, fixed_point):
        with pytest.raises(ValueError, match="max_iter allows for 0 iterations"):
            solver(func, start, max_iter=0)
    with pytest.raises(ValueError, match="memory=0"):
        broyden(func, start, memory=0)
    with pytest.raises(ValueError, match="max_iter=2"):
        anderson(func, start, max_iter=2)
    with pytest.raises(ValueError, match="broyden_fast takes full steps"):
        _solver("broyden_fast")(func, start, ls=True)


def _solver(name):
    with dpp.enabled("torchdeq"):
        return get_solver(name)


@pytest.mark.numerics
@torch.no_grad()
def test_broyden_with_little_memory_starts_anew():
    problem = make_equilibrium([(3, 20)], norm=0.9)
    start = torch.zeros(3, 20, dtype=torch.float64)
    solution = broyden(problem.func, start, max_iter=200, tol=1e-10, memory=4)
    torch.testing.assert_close(solution.state, problem.state, rtol=1e-7, atol=1e-8)
    with dpp.enabled("torchdeq"):
        deq = get_deq(f_solver="broyden_fast", f_max_iter=200, f_tol=1e-10).eval()
        (state,), _ = deq(problem.func, start, solver_kwargs={"LBFGS_thres": 4})
    assert torch.equal(state, solution.state)


# ------------------------------------------------------------ the estimate of the inverse


def dense(matrices, vectors):
    return (matrices @ vectors[:, :, None]).squeeze(2)


def broyden_by_hand(func, x, steps):
    """Broyden's first method with dense matrices: all iterates, and the last two inverses."""
    batch, size = x.shape
    inverse = before = -torch.eye(size, dtype=x.dtype).expand(batch, size, size)
    residual, iterates = func(x) - x, []
    for _ in range(steps):
        step = -dense(inverse, residual)
        x = x + step
        iterates.append(x)
        new = func(x) - x
        image = dense(inverse, new - residual)
        denominator = (step * image).sum(1)[:, None, None]
        before = inverse
        inverse = inverse + (step - image)[:, :, None] @ (step[:, None] @ inverse) / denominator
        residual = new
    return iterates, inverse, before


@pytest.mark.numerics
def test_the_estimate_is_broydens():
    problem = make_equilibrium([(3, 12)], norm=0.9)
    start = torch.zeros(3, 12, dtype=torch.float64)
    iterates, inverse, before = broyden_by_hand(problem.func, start, 6)
    solution = broyden(problem.func, start, max_iter=6, tol=0.0, keep_inverse=True)
    torch.testing.assert_close(solution.state, iterates[-1], rtol=1e-12, atol=1e-12)
    v = torch.randn(3, 12, dtype=torch.float64)
    (got,) = solution.inverse_jacobian.transposed([v])
    torch.testing.assert_close(got, -dense(inverse.mT, v), rtol=1e-7, atol=1e-8)
    # One change of the residual fewer is another estimate: the comparison can tell.
    assert (got + dense(before.mT, v)).norm() > 1e-3 * got.norm()


def test_a_broken_down_update_is_skipped():
    rows = torch.ones(2, 3, dtype=torch.float64)
    everywhere = torch.ones(2, dtype=torch.bool)
    estimate = InverseEstimate(rows, 5)
    estimate.room.copy_(rows)
    first = estimate.step(everywhere)
    # The residual did not change: the update would divide by zero.
    estimate.room.copy_(rows)
    second = estimate.step(everywhere)
    assert torch.isfinite(second).all()
    torch.testing.assert_close(second, first)


# -------------------------------------------------------------------- what a review found


@pytest.mark.parametrize("solver", SOLVERS)
def test_under_autocast_only_f_is_in_16_bits(solver):
    # F itself computes in float32, so that only the solver's own algebra could be worse.
    weight = torch.randn(30, 30)
    weight *= 0.9 / torch.linalg.matrix_norm(weight, 2)
    inject = torch.randn(4, 30)
    inside = []

    def func(h):
        inside.append(torch.is_autocast_enabled("cpu"))
        with torch.autocast("cpu", enabled=False):
            return torch.tanh(h @ weight.mT + inject)

    plain = solver(func, torch.zeros(4, 30), max_iter=100, tol=1e-5)
    inside.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = solver(func, torch.zeros(4, 30), max_iter=100, tol=1e-5)
    assert all(inside)
    assert torch.equal(cast.state, plain.state)


@pytest.mark.parametrize("options", [{}, {"tau": 0.7}])
def test_a_state_keeps_its_dtype_under_autocast(options):
    linear = torch.nn.Linear(8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = fixed_point(
            lambda h: torch.tanh(0.3 * linear(h)), torch.zeros(2, 8), tol=1e-2, **options
        )
    assert solution.state.dtype == torch.float32


@pytest.mark.parametrize("solver", SOLVERS)
def test_f_may_return_the_same_memory_each_time(solver):
    problem = make_equilibrium([(3, 6)], norm=0.6)
    buffer = torch.empty(3, 6, dtype=torch.float64)

    def func(h):
        return buffer.copy_(problem.func(h).detach())

    solution = solver(func, torch.zeros(3, 6, dtype=torch.float64), max_iter=100, tol=1e-9)
    torch.testing.assert_close(solution.state, problem.state, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("solver", SOLVERS)
def test_leaves_without_a_common_batch_are_one_sample(solver):
    want = [torch.full((3, 2), 0.7390851), torch.full((4, 2), 0.7390851)]
    solution = solver(
        lambda h: [torch.cos(leaf) for leaf in h],
        [torch.zeros(3, 2), torch.zeros(4, 2)],
        max_iter=60,
        tol=1e-5,
    )
    assert solution.abs_lowest.shape == (1,)
    torch.testing.assert_close(solution.state, want, rtol=1e-4, atol=1e-4)


def closures_of_a_model():
    """Maps made anew each step, as models make them, of the same two layers."""
    torch.manual_seed(0)
    one, two = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    while True:
        u = torch.randn(5, 8)
        yield lambda a, b, u=u: [torch.tanh(0.3 * one(b) + u), torch.tanh(0.3 * two(a) + 0.2 * b)]


@pytest.mark.parametrize("solver", sorted(NAMES.values()))
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_f(solver, backend, monkeypatch):
    modes, compiler = [], torch.compile

    def compile_(func, mode, dynamic):
        modes.append(mode)
        return compiler(func, backend=backend, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", compile_)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    start, graphs = [torch.zeros(5, 8), torch.zeros(5, 8)], []
    with dpp.enabled("torchdeq"):
        deq = get_deq(f_solver=solver, grad="upg", f_max_iter=12, f_tol=0.0)
        for _, func in zip(range(3), closures_of_a_model(), strict=False):
            eager, _ = deq(func, start)
            assert modes == [None] * len(graphs)
            compiled, _ = deq(func, start, solver_kwargs={"compile": True})
            torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    # None is compiled anew, though each step has another closure.
    assert graphs[0] in (1, 2)
    assert graphs == [graphs[0]] * 3


def test_modes_are_torch_compiles():
    with pytest.raises(RuntimeError, match="reduce-overhead"):
        fixed_point(torch.cos, torch.zeros(2, 3), compile="reduced-overhead")


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_empty_batch(solver):
    assert solver(lambda h: 0.5 * h, torch.zeros(0, 5)).state.shape == (0, 5)


def test_limited_memory_keeps_no_estimate():
    with pytest.raises(ValueError, match="memory=4 with keep_inverse=True"):
        broyden(torch.cos, torch.zeros(2, 3), memory=4, keep_inverse=True)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_models_know_their_solver(copied):
    problem = make_equilibrium([(3, 6)], norm=0.6)
    with dpp.enabled("torchdeq"):
        deq = copied(get_deq(f_solver="broyden_fast", grad="shine", f_max_iter=40, f_tol=1e-9))
        (state,), _ = deq(problem.func, torch.zeros(3, 6, dtype=torch.float64))
        problem.linear_loss(state).backward()


def test_threads_may_run_one_model_at_once():
    func, start, _ = two_scales()
    with dpp.enabled("torchdeq"):
        deq = get_deq(f_solver="broyden_fast", f_max_iter=5).eval()
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: evaluate(deq, func, start)[0][-1], range(60)))
    for state in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(state, found[0], strict=True))


@pytest.mark.parametrize("name", sorted(NAMES.values()))
def test_as_the_backward_solver_of_a_named_gradient(name):
    with dpp.enabled("torchdeq"):
        deq = get_deq(grad="ift", b_solver=name)
    assert deq.produce_grad[0].strategy.solver == name.removesuffix("_fast")
