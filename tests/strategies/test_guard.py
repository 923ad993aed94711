"""`guard`: what happens where a forward or an adjoint solve fails."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torchdeq import get_deq

import deq_phantom_plugin as dpp
from deq_phantom_plugin.testing import make_equilibrium

EXACT = "ift(tol=1e-12, max_iter=100)"


def guard(grad=EXACT, on_failure="warn", **tolerances):
    return dpp.get_strategy({"name": "guard", "grad": grad, "on_failure": on_failure, **tolerances})


def gradients(problem, spec, state=None, memory=None, context=None):
    """dL/d(injection), a row a sample, with a loss whose v does not depend on the state."""
    context = dpp.Context(memory=memory) if context is None else context
    attached = dpp.attach(problem.func, problem.state if state is None else state, spec, context)
    return attached, torch.autograd.grad(problem.linear_loss(attached), problem.params[1])[0]


def per_sample_norms(norms, size=6, batch=4):
    """tanh(W h + u) with another W for each sample, of a given spectral norm; at h = 0."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(size, size, generator=generator, dtype=torch.float64)
    raw = (raw + raw.mT) / torch.linalg.eigvalsh(raw + raw.mT).abs().max()
    weights = torch.stack([raw * norm for norm in norms])
    inject = torch.zeros(batch, size, dtype=torch.float64, requires_grad=True)
    state = torch.zeros(batch, size, dtype=torch.float64)
    return lambda h: torch.tanh((weights @ h[:, :, None]).squeeze(2) + inject), state, inject


# --- nothing fails -------------------------------------------------------------------------------


@pytest.mark.parametrize("on_failure", ["warn", "raise", "fallback('jfb')"])
@pytest.mark.parametrize("grad", [EXACT, "upg", "npg(k=3)", "jfb", "exact"])
def test_where_nothing_fails_it_is_the_strategy(grad, on_failure):
    problem, memory = make_equilibrium([(3, 4)]), dpp.Memory()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = problem.gradient(guard(grad, on_failure), dpp.Context(memory=memory))
    torch.testing.assert_close(got, problem.gradient(grad), rtol=0, atol=0)
    assert dpp.failures(memory) == {"forward": 0, "adjoint": 0}


def test_a_strategy_that_solves_is_left_alone():
    problem = make_equilibrium([(3, 4)])
    start = torch.zeros_like(problem.state)
    want = problem.gradient("bptt(steps=3)", start=start)
    torch.testing.assert_close(problem.gradient(guard("bptt(steps=3)"), start=start), want)


# --- the forward solve ---------------------------------------------------------------------------


def half_solved():
    """An equilibrium whose second sample is far from one."""
    problem = make_equilibrium([(3, 4)])
    state = problem.state.clone()
    state[1] += 1
    return problem, state


@pytest.mark.filterwarnings("ignore:h is no equilibrium")  # of the exact gradient there
def test_forward_warns_once_and_goes_on():
    problem, state = half_solved()
    memory = dpp.Memory()
    with pytest.warns(dpp.ConvergenceWarning, match="forward solve .* above 0.1 in 1 of 3") as seen:
        _, got = gradients(problem, guard(), state, memory)
        gradients(problem, guard(), state, memory)
    assert len(seen) == 1
    torch.testing.assert_close(got, gradients(problem, EXACT, state)[1])
    assert dpp.failures(memory) == {"forward": 2, "adjoint": 0}


def test_forward_raises():
    problem, state = half_solved()
    with pytest.raises(dpp.ConvergenceError, match=r"in 1 of 3 samples. Samples: \[1\]"):
        gradients(problem, guard(on_failure="raise"), state)
    gradients(problem, guard(on_failure="raise", forward_tol=10), state)


@pytest.mark.filterwarnings("ignore:h is no equilibrium")  # of the exact gradient there
@pytest.mark.filterwarnings("ignore::deq_phantom_plugin.ConvergenceWarning")
@pytest.mark.parametrize("fallback", ["jfb", "npg(k=3)", "upg(k=2)"])
def test_forward_falls_back_in_the_samples_that_failed(fallback):
    problem, state = half_solved()
    value, got = gradients(problem, guard(on_failure=f"fallback({fallback!r})"), state)
    own_value, own = gradients(problem, EXACT, state)
    other_value, other = gradients(problem, fallback, state)
    for result, mine, others in ((value, own_value, other_value), (got, own, other)):
        torch.testing.assert_close(result[[0, 2]], mine[[0, 2]])
        torch.testing.assert_close(result[1], others[1])
    assert not torch.allclose(own[1], other[1], rtol=1e-2)


@pytest.mark.filterwarnings("ignore::deq_phantom_plugin.ConvergenceWarning")
def test_coupled_samples_fail_together():
    problem = make_equilibrium([(3, 4)], coupled=True)
    state = problem.state + 1
    context = dpp.Context(batch_dim=None)
    attached = dpp.attach(problem.func, state, guard(on_failure="fallback('jfb')"), context)
    got = torch.autograd.grad(problem.linear_loss(attached), problem.params[1])[0]
    want = dpp.attach(problem.func, state, "jfb")
    want = torch.autograd.grad(problem.linear_loss(want), problem.params[1])[0]
    torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore::deq_phantom_plugin.ConvergenceWarning")
@pytest.mark.parametrize("start", [None, 0.25])
def test_states_that_are_not_finite_begin_again(start):
    problem = make_equilibrium([(3, 4)])
    state = problem.state.clone()
    state[0, 2] = torch.nan
    state[2] = torch.inf
    for policy in ("warn", "raise"):
        with pytest.raises(ValueError, match="NaN or Inf: the forward solve diverged"):
            gradients(problem, guard(on_failure=policy), state)
    begin = torch.zeros_like(state) if start is None else torch.full_like(state, start)
    context = dpp.Context(memory=dpp.Memory(), initial_state=None if start is None else begin)
    value, got = gradients(problem, guard(on_failure="fallback('jfb')"), state, context=context)
    want_value, want = gradients(problem, "jfb", begin)
    torch.testing.assert_close(value[[0, 2]], want_value[[0, 2]])
    torch.testing.assert_close(got[[0, 2]], want[[0, 2]])
    torch.testing.assert_close(got[1], gradients(problem, EXACT)[1][1])
    assert dpp.failures(context.memory)["forward"] == 2


# --- the adjoint solve ---------------------------------------------------------------------------


def test_adjoint_warns_once_and_keeps_the_best():
    func, state, inject = per_sample_norms([0.5, 3.0, 0.5, 3.0])
    memory, spec = dpp.Memory(), "ift(solver='fixed_point', max_iter=10)"
    context = dpp.Context(memory=memory)
    with pytest.warns(dpp.ConvergenceWarning, match="adjoint solve .* in 2 of 4 samples") as seen:
        for _ in range(2):
            attached = dpp.attach(func, state, guard(spec), context)
            got = torch.autograd.grad(attached.sum(), inject)[0]
    assert len(seen) == 1
    assert dpp.failures(memory) == {"forward": 0, "adjoint": 4}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dpp.ConvergenceWarning)
        want = torch.autograd.grad(dpp.attach(func, state, spec).sum(), inject)[0]
    torch.testing.assert_close(got, want)


def test_adjoint_raises():
    func, state, _ = per_sample_norms([0.5, 3.0, 0.5, 3.0])
    spec = "ift(solver='fixed_point', max_iter=10)"
    attached = dpp.attach(func, state, guard(spec, "raise"))
    with pytest.raises(dpp.ConvergenceError, match=r"in 2 of 4 samples. Samples: \[1, 3\]"):
        attached.sum().backward()
    dpp.attach(func, state, guard(spec, "raise", adjoint_tol=1e9)).sum().backward()


@pytest.mark.filterwarnings("ignore::deq_phantom_plugin.ConvergenceWarning")
@pytest.mark.parametrize("fallback", ["jfb", "npg(k=3)", "upg(k=3)"])
@pytest.mark.parametrize("solver", ["fixed_point", "gmres"])
def test_adjoint_falls_back_in_the_samples_that_failed(solver, fallback):
    # Three products are enough for one sample alone.
    func, state, inject = per_sample_norms([0.02, 3.0, 0.02, 3.0])
    spec = f"ift(solver={solver!r}, max_iter=3)"
    memory = dpp.Memory()
    context = dpp.Context(memory=memory)

    def gradient(grad):
        attached = dpp.attach(func, state, grad, context)
        v = torch.linspace(-1, 2, attached.numel(), dtype=torch.float64).view_as(attached)
        return torch.autograd.grad((v * attached).sum(), inject)[0]

    got = gradient(guard(spec, f"fallback({fallback!r})"))
    torch.testing.assert_close(got[[0, 2]], gradient(spec)[[0, 2]])
    torch.testing.assert_close(got[[1, 3]], gradient(fallback)[[1, 3]])
    assert dpp.failures(memory) == {"forward": 0, "adjoint": 2}


@pytest.mark.filterwarnings("ignore::deq_phantom_plugin.ConvergenceWarning")
@pytest.mark.parametrize("solver", ["gmres", "bicgstab", "anderson", "broyden", "fixed_point"])
def test_a_nan_in_one_adjoint_solve_leaves_the_others_alone(solver):
    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            # A derivative that overflows in the second sample.
            return grad * torch.tensor([[1.0], [torch.inf], [1.0]], dtype=grad.dtype)

    problem = make_equilibrium([(3, 4)], norm=0.6)
    inject = problem.params[1]
    func = lambda h: problem.func(Poison.apply(h))  # noqa: E731
    spec = f"ift(solver={solver!r}, tol=1e-10, max_iter=100)"

    def gradient(policy):
        attached = dpp.attach(func, problem.state, guard(spec, policy))
        return torch.autograd.grad(problem.linear_loss(attached), inject)[0]

    want = gradients(problem, EXACT)[1]
    with pytest.raises(dpp.NonFiniteError, match="in 1 of 3 samples"):
        gradient("raise")
    with_fallback, with_zero = gradient("fallback('jfb')"), gradient("warn")
    for got in (with_fallback, with_zero):
        torch.testing.assert_close(got[[0, 2]], want[[0, 2]], rtol=1e-8, atol=1e-8)
    assert torch.equal(with_zero[1], torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(with_fallback[1], gradients(problem, "jfb")[1][1])


@pytest.mark.filterwarnings("ignore::deq_phantom_plugin.ConvergenceWarning")
def test_an_overflow_of_the_loss_passes_through():
    problem, memory = make_equilibrium([(3, 4)]), dpp.Memory()
    attached = dpp.attach(
        problem.func, problem.state, guard(on_failure="fallback('jfb')"), dpp.Context(memory=memory)
    )
    v = torch.ones_like(attached)
    v[1] = torch.inf
    got = torch.autograd.grad(attached, problem.params[1], v)[0]
    assert not torch.isfinite(got[1]).all()
    assert torch.isfinite(got[[0, 2]]).all()
    assert dpp.failures(memory) == {"forward": 0, "adjoint": 0}


# --- in training ---------------------------------------------------------------------------------


class Growing(torch.nn.Module):
    """A model whose loss pays for a large state, so that rho(J) grows past one."""

    def __init__(self, grad):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(8, 8, bias=False)
        self.deq = get_deq(grad=grad, f_solver="fixed_point_iter", f_max_iter=25, f_tol=1e-6)

    def forward(self, x):
        # Odd, so that beyond rho(J) = 1 the iteration swings.
        func = lambda h: torch.tanh(-self.linear(h) @ self.linear.weight + x)  # noqa: E731
        return self.deq(func, torch.zeros_like(x))[0][-1]


@pytest.mark.filterwarnings("ignore::deq_phantom_plugin.ConvergenceWarning")
def test_a_run_survives_where_rho_grows_past_one():
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    radii = []
    with dpp.enabled("torchdeq"):
        spec = "guard('ift(solver=\"fixed_point\", max_iter=30)', on_failure=\"fallback('jfb')\")"
        model = Growing(spec)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for step in range(60):
            optimizer.zero_grad()
            loss = -model.linear(model(x)).square().mean() + (model.linear.weight.norm() - 6) ** 2
            loss.backward()
            optimizer.step()
            radii.append(float(torch.linalg.matrix_norm(model.linear.weight.detach(), 2)))
            assert torch.isfinite(model.linear.weight).all(), step
        counts = dpp.failures(model)
        assert radii[-1] > 1.5 > radii[0]
        assert counts["forward"] > 0
        assert counts["forward"] < 60 * 16  # it began well
        assert "failures" in repr(model.deq.grad_memory[0])
        strict = Growing(spec.replace("fallback('jfb')", "raise"))
        strict.load_state_dict(model.state_dict())
        with pytest.raises(dpp.ConvergenceError):
            strict(x)


def test_the_monitor_reports_them():
    problem, state = half_solved()
    logged = []
    with dpp.enabled("torchdeq"):
        model = torch.nn.Module()
        model.deq = get_deq(grad=guard(on_failure="fallback('jfb')"), f_max_iter=1, f_tol=1e-9)
        with (
            dpp.monitor(model, lambda numbers, step: logged.append(numbers), every=1),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            (h,), _ = model.deq(problem.func, state)
            problem.linear_loss(h).backward()
    assert logged[0]["deq/forward_failures"] == dpp.failures(model)["forward"] > 0
    assert logged[0]["deq/adjoint_failures"] == 0


# --- specs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        "guard",
        "guard('upg')",
        "guard('ift', on_failure='raise', forward_tol=1.0, adjoint_tol=0.5)",
        "guard('npg(k=2)', on_failure=\"fallback('jfb')\")",
        "guard(\"schedule({0: 'bptt(steps=2)', 5: 'ift'})\", 'raise')",
    ],
)
def test_specs_parse_back(spec):
    strategy = dpp.get_strategy(spec)
    for again in (repr(strategy), copy.deepcopy(strategy), pickle.loads(pickle.dumps(strategy))):
        again = dpp.get_strategy(again)
        assert again == strategy
        assert repr(again) == repr(strategy)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("guard('ift', on_failure='explode')", r"on_failure='explode'; expected 'warn', 'raise'"),
        ("guard('ift', on_failure='fallback')", "on_failure='fallback'; expected"),
        ("guard('ift', on_failure='warn(3)')", r"on_failure='warn\(3\)'; expected"),
        ("guard('ift', on_failure=3)", "on_failure=3; expected"),
        ("guard('ift', on_failure=\"fallback('jfbb')\")", "did you mean 'jfb'"),
        ("guard('ift', on_failure=\"fallback('bptt')\")", "owns its solve"),
        ("guard('ift', on_failure='fallback(__import__)')", "not a literal"),
        ("guard('iftt')", "did you mean 'ift'"),
        ("guard('ift', forward_tol=0)", "forward_tol=0; expected a finite number above 0"),
        ("guard('ift', adjoint_tol='x')", "adjoint_tol='x'; expected"),
    ],
)
def test_bad_specs_are_refused_by_name(spec, message):
    with pytest.raises(ValueError, match=message):
        dpp.get_strategy(spec)


def test_schedules_inside():
    problem, memory = make_equilibrium([(3, 4)]), dpp.Memory()
    spec = guard("schedule({0: 'jfb', 5: 'upg(k=3)'})")
    for step, want in ((0, "jfb"), (5, "upg(k=3)")):
        memory.step = step
        got = problem.gradient(spec, dpp.Context(memory=memory))
        torch.testing.assert_close(got, problem.gradient(want))


def test_shine_inside_torchdeq():
    problem = make_equilibrium([(3, 6)], norm=0.6)
    start = torch.zeros(3, 6, dtype=torch.float64)
    found = []
    with dpp.enabled("torchdeq"):
        for spec in ("shine", guard("shine")):
            deq = get_deq(f_solver="broyden_fast", grad=spec, f_max_iter=40, f_tol=1e-9)
            (state,), _ = deq(problem.func, start)
            found.append(torch.autograd.grad(problem.linear_loss(state), problem.params[1])[0])
    torch.testing.assert_close(found[0], found[1])


def test_failures_of_a_model_in_which_nothing_counts_are_asked_for_in_vain():
    with pytest.warns(UserWarning, match="failures: .*equilibri.* So nothing has counted"):
        assert dpp.failures(torch.nn.Linear(2, 2)) == {"forward": 0, "adjoint": 0}
