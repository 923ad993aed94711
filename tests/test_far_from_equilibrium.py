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


def residuals(func, h):
    """Return ||F(h) - h|| of each row, over the larger one of ||F(h)|| and ||h||."""
    norm = torch.linalg.vector_norm
    return norm(func(h) - h, dim=1) / torch.maximum(norm(func(h), dim=1), norm(h, dim=1))


@pytest.mark.parametrize("spec", ASSUME)
def test_it_is_said_of_another_map_and_of_a_solve_that_stopped_short(spec):
    func, other = Map(), Map(seed=1)
    assert said(func, func.after(60), spec) == []
    (text,) = said(other, func.after(60), spec)
    apart = residuals(other, func.after(60))
    assert (apart > 0.1).all()
    assert "no equilibrium of F in 4 of 4 samples" in text
    assert f"differs from h by up to {apart.max():.0%} of its size" in text
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


# --- what is measured --------------------------------------------------------------------------


def test_one_sample_of_many_is_seen():
    func = Map()
    h = func.after(60)
    h[2] = 0.0
    (text,) = said(func, h, "ift")
    assert "no equilibrium of F in 1 of 4 samples: F(h) differs from h by 100% of its size" in text


def test_samples_that_depend_on_one_another_are_measured_together():
    def func(h):
        return 0.1 * h + 0.1 * h.mean(0, keepdim=True) + 80.0 * torch.ones(4, 1).double()

    h = torch.full((4, 3), 100.0, dtype=torch.float64)
    h[0] = 80.0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the samples of the batch depend", AssumptionWarning)
        assert residuals(func, h).max() > 0.1
        assert said(func, h, "ift") == []
        (text,) = said(func, 0.5 * h, "ift")
    assert "no equilibrium of F: F(h) differs" in text


@pytest.mark.parametrize("solver", ["anderson", "broyden", "fixed_point_iter"])
@pytest.mark.parametrize("scale", [0.0, 1e-4])
def test_an_equilibrium_at_zero_is_one(solver, scale):
    """TorchDEQ stops at an absolute 1e-3, where the residual is large relative to a state of 0."""
    torchdeq = pytest.importorskip("torchdeq")
    dpp.enable("torchdeq")
    func = Map()
    inject = (scale * func.inject).requires_grad_()
    deq = torchdeq.get_deq(grad="ift(tol=1e-10)", f_solver=solver)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        states, _ = deq(lambda h: torch.tanh(h @ func.weight + inject), torch.randn(4, 6).double())
    (got,) = torch.autograd.grad(states[-1].sum(), inject)
    exact = torch.linalg.solve(torch.eye(6).double() - func.weight.detach(), torch.ones(6).double())
    torch.testing.assert_close(got, exact.expand(4, 6), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("size", [1.0, 200.0])
def test_norms_of_sixteen_bits_do_not_overflow(dtype, size):
    h = torch.full((4, 256, 256), size).to(dtype)
    weight = torch.full((256,), 0.5).to(dtype).requires_grad_()
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        dpp.attach(lambda h: h * weight, h, "ift", dpp.Context(memory=dpp.Memory()))
    assert "in 4 of 4 samples: F(h) differs from h by up to 50%" in str(given[0].message)


def test_a_state_whose_leaves_agree_on_no_samples_is_measured_too():
    func, start = Map(), torch.zeros(1, 6).double()

    def both(state):
        a, b = state
        return func(a), torch.tanh(b @ func.weight + 1.0)

    (text,) = said_of_leaves(both, (func.after(60), start))
    assert "no equilibrium of F: F(h) differs" in text
    solved = start
    for _ in range(60):
        solved = torch.tanh(solved @ func.weight + 1.0).detach()
    assert said_of_leaves(both, (func.after(60), solved)) == []
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    assert said(lambda x: torch.cos(weight * x), torch.tensor(5.0).double(), "ift")


def said_of_leaves(func, state):
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        dpp.attach(func, state, "ift", dpp.Context(memory=dpp.Memory()))
    return [str(w.message) for w in given]


def test_a_map_that_draws_is_called_that_and_nothing_else():
    func, drop = Map(), torch.nn.Dropout(0.2)
    torch.manual_seed(0)
    for _ in range(5):
        h = func.after(60)
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            context = dpp.Context(memory=dpp.Memory())
            dpp.attach(lambda h: func(drop(h)), h, "ift", context)
        (text,) = [str(w.message) for w in given]
        assert "F is not the same map each time" in text


# --- when it is asked --------------------------------------------------------------------------


@pytest.mark.parametrize("period", [2, 3, 4, 8])
@pytest.mark.parametrize("bad", [0, 1, -1])
def test_solves_that_share_a_memory_have_their_turn(period, bad):
    func, memory = Map(), dpp.Memory()
    good, far = func.after(60), func.after(1)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        for call in range(61 * period):
            h = far if call % period == bad % period else good
            dpp.attach(func, h, "npg(k=1, lam='adaptive')", dpp.Context(memory=memory))
    assert len(given) == 1


def test_a_switch_to_a_strategy_that_assumes_an_equilibrium_asks_at_once():
    func, memory = Map(), dpp.Memory()
    context = dpp.Context(memory=memory)
    assert dpp.attach(func, func.after(1), "upg(lam='adaptive')", context).requires_grad
    with pytest.warns(AssumptionWarning, match="no equilibrium"):
        dpp.attach(func, func.after(1), "ift", context)


# --- where the solve is ours, or TorchDEQ's ----------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "speaks"),
    [
        ({"max_iter": 1, "tol": 0.0}, True),
        ({"max_iter": 2, "tol": 0.5}, True),
        ({"max_iter": 60, "tol": 0.0}, False),
        ({"max_iter": 60, "tol": 1e-6}, False),
    ],
)
@pytest.mark.parametrize("spec", ["ift", "exact"])
def test_an_equilibrium_whose_tol_says_nothing(spec, settings, speaks):
    func = Map(seed=3)
    func.weight = (3.0 * func.weight).detach().requires_grad_()
    equilibrium = dpp.Equilibrium("fixed_point", spec, **settings)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        equilibrium(func, torch.zeros_like(func.inject))
    assert bool(given) == speaks, [str(w.message) for w in given]
    assert all("no equilibrium" in str(w.message) for w in given)


@pytest.mark.parametrize("core", ["indexing", "sliced"])
def test_states_on_the_way_are_not_called_far(core):
    torchdeq = pytest.importorskip("torchdeq")
    dpp.enable("torchdeq")
    func = Map()
    # Without a tolerance, or DEQIndexing leaves out its last state where a solver stops early.
    settings = {"core": core, "grad": "ift", "f_solver": "fixed_point_iter", "f_tol": 0.0}
    start = torch.zeros_like(func.inject)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        states, _ = torchdeq.get_deq(**settings, f_max_iter=40, indexing=[1])(func, start)
    assert len(states) == 2
    # `ift` returns F(h), which is nearer to the equilibrium than h.
    assert residuals(func, states[0].detach()).max() > 1e-3
    with pytest.warns(AssumptionWarning, match="no equilibrium"):
        torchdeq.get_deq(**settings, f_max_iter=1)(func, start)


@pytest.mark.parametrize("solver", ["fixed_point_iter", "broyden"])
def test_an_equilibrium_that_torchdeq_leaves_out_is_said(solver):
    """DEQIndexing hands out no last state where its solver stops before f_max_iter."""
    torchdeq = pytest.importorskip("torchdeq")
    dpp.enable("torchdeq")
    func = Map()
    start = torch.zeros_like(func.inject)

    def run(f_tol, f_max_iter=40):
        settings = {"core": "indexing", "grad": "upg", "f_solver": solver, "indexing": [2]}
        deq = torchdeq.get_deq(**settings, f_tol=f_tol, f_max_iter=f_max_iter)
        return len(deq(func, start)[0])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(f_tol=0.0, f_max_iter=4) == 2
    with pytest.warns(AssumptionWarning, match="1 of 2 states, and the last one is that of step 2"):
        assert run(f_tol=1e-6) == 1


@pytest.mark.parametrize("solver", ["fixed_point_iter", "anderson", "broyden"])
def test_a_sampled_step_at_which_the_solver_stops_is_the_equilibrium(solver):
    torchdeq = pytest.importorskip("torchdeq")
    dpp.enable("torchdeq")
    func = Map()
    start = torch.zeros_like(func.inject)
    settings = {"core": "indexing", "grad": "upg", "f_solver": solver, "f_tol": 1e-6}
    _, info = torchdeq.get_deq(**settings, f_max_iter=40)(func, start)
    last = int(info["nstep"].max()) + (solver == "broyden")  # Broyden's samples one step later
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        states, _ = torchdeq.get_deq(**settings, f_max_iter=40, indexing=[last])(func, start)
    assert residuals(func, states[-1].detach()).max() < 1e-5


def test_a_state_that_is_left_out_is_said_in_one_warning():
    torchdeq = pytest.importorskip("torchdeq")
    dpp.enable("torchdeq")
    func = Map()
    settings = {"core": "indexing", "grad": "ift", "f_solver": "fixed_point_iter", "f_tol": 1e-6}
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        deq = torchdeq.get_deq(**settings, f_max_iter=40, indexing=[1])
        deq(func, torch.zeros_like(func.inject))
    (text,) = [str(w.message) for w in given]
    assert "leaves out the equilibrium" in text


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_image_that_is_not_finite_is_said(bad):
    func = Map()

    def broken(h):
        spoilt = torch.zeros_like(h)
        spoilt[1] = bad
        return func(h) + spoilt

    (text,) = said(broken, func.after(60), "ift(max_iter=1)")
    assert "no equilibrium of F in 1 of 4 samples: F(h) is not finite." in text
