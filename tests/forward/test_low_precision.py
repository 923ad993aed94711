"""Solves in 16 bits: what they end in is the model's own, whatever the first part of them made.

References are dense solves in float64, and loops by hand.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.late_read import LateRead
from deq_phantom_plugin.forward import anderson, broyden, fixed_point

SOLVERS = [anderson, broyden, fixed_point]
BEYOND = {anderson: 0, broyden: 1, fixed_point: 0}
"""Evaluations that a solver takes beyond its iterations."""


def low():
    """Whether F is evaluated under autocast."""
    return torch.is_autocast_enabled("cpu")


class Linear:
    """F(h) = W h + u, with what it was evaluated under, and its equilibrium in float64.

    Args:
        norm: of W, which is symmetric.
        under_autocast: another map, for evaluations under autocast.
    """

    def __init__(self, norm=0.6, under_autocast=None, batch=5, size=24):
        raw = torch.randn(size, size, dtype=torch.float64)
        raw = raw + raw.mT
        weight = raw * (norm / torch.linalg.matrix_norm(raw, 2))
        self.u = torch.randn(batch, size)
        self.weight = nn.Parameter(weight.float())
        identity = torch.eye(size, dtype=torch.float64)
        self.equilibrium = torch.linalg.solve(
            identity - self.weight.detach().double(), self.u.double().mT
        ).mT
        self.start = torch.zeros(batch, size)
        self.under_autocast, self.evaluations = under_autocast, []

    def __call__(self, h):
        self.evaluations.append(low())
        if low() and self.under_autocast is not None:
            return self.under_autocast(h)
        return F.linear(h, self.weight) + self.u

    def error(self, state):
        """The error of each sample, relative."""
        distance = (state.double() - self.equilibrium).norm(dim=1)
        return distance / self.equilibrium.norm(dim=1)

    def residual(self, state, relative=True):
        """||F(h) - h|| of each sample, over ||F(h)||, in float64."""
        h, weight = state.double(), self.weight.detach().double()
        image = h @ weight.mT + self.u.double()
        return (image - h).norm(dim=1) / (image.norm(dim=1) if relative else 1)


ODD = {
    "as it is": None,
    "says that any state is the equilibrium": lambda h: h.clone(),
    "has another equilibrium": lambda h: 0.5 * h + 3,
    "overflows": lambda h: h * torch.inf,
    "is no number": lambda h: torch.full_like(h, torch.nan),
    "diverges": lambda h: 3 * h + 1,
    "returns 16 bits": lambda h: h.bfloat16(),
}
"""What autocast may make of F."""


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "float16"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_end_is_that_of_a_dense_solve(solver, dtype):
    func = Linear()
    found = solver(func, func.start, tol=1e-5, stop_mode="rel", solve_dtype=dtype)
    assert func.error(found.state).max() < 1e-5 / (1 - 0.6)
    n_low = sum(func.evaluations)
    assert n_low > 3
    # The first is the model's own; then there is one change, from 16 bits to it.
    n_last = len(func.evaluations) - n_low - 1
    assert n_last >= 1
    assert func.evaluations == [False, *[True] * n_low, *[False] * n_last]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("odd", sorted(set(ODD) - {"diverges"}))
@pytest.mark.parametrize("solver", SOLVERS)
def test_whatever_16_bits_make_of_a_map(solver, odd, late, monkeypatch):
    monkeypatch.setattr(LateRead, "is_late", staticmethod(lambda device: late))
    func = Linear(under_autocast=ODD[odd])
    found = solver(func, func.start, tol=1e-5, stop_mode="rel", solve_dtype="bfloat16")
    assert func.error(found.state).max() < 1e-5 / (1 - 0.6)
    # TorchDEQ's Anderson and fixed point return F(h) with the residual of h.
    own = func.residual(found.state)
    assert (found.rel_lowest < 1e-5).all()
    assert (own <= found.rel_lowest * 1.01 + 2e-7).all()


@pytest.mark.parametrize("stop_mode", ["abs", "rel"])
@pytest.mark.parametrize("odd", ["as it is", "says that any state is the equilibrium", "diverges"])
def test_the_residual_is_the_models_own(stop_mode, odd):
    """Where the budget ends before the tolerance is reached, too."""
    for max_iter in (2, 5, 9, 14, 40):
        func = Linear(0.9, ODD[odd])
        settings = {"max_iter": max_iter, "tol": 1e-5, "stop_mode": stop_mode}
        found = broyden(func, func.start, solve_dtype="bfloat16", **settings)
        told, own = found.rel_lowest, func.residual(found.state)
        if stop_mode == "abs":
            told, own = found.abs_lowest, func.residual(found.state, relative=False)
        torch.testing.assert_close(told.double(), own, rtol=1e-2, atol=5e-6)
        assert func.evaluations[-1] is False


@pytest.mark.parametrize("return_final", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_budget_is_for_all_evaluations_together(solver, return_final):
    for max_iter in range(1 if solver is not anderson else 3, 30):
        full, half = Linear(0.95), Linear(0.95)
        settings = {"max_iter": max_iter, "tol": 0.0, "return_final": return_final}
        plain = solver(full, full.start, **settings)
        found = solver(half, half.start, solve_dtype="bfloat16", **settings)
        n = len(half.evaluations)
        assert n <= len(full.evaluations) == max_iter + BEYOND[solver]
        if return_final:
            assert n == len(full.evaluations)
            # The first and the last, but of so few that there is no room for two solves.
            assert half.evaluations.count(False) in ([2] if max_iter > 3 else [2, n])
        for name in ("abs_trace", "rel_trace", "abs_lowest", "rel_lowest", "n_steps"):
            assert getattr(found, name).shape == getattr(plain, name).shape, name
        assert (found.n_steps <= n).all()
        assert (found.n_steps >= 1).all()


def test_a_fixed_number_of_iterations_is_the_loop_by_hand():
    func = Linear(0.95)
    found = fixed_point(func, func.start, max_iter=9, return_final=True, solve_dtype="bfloat16")
    h = func(func.start)
    with torch.no_grad():
        for _ in range(7):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                h = func(h).float()
        h = func(h)
    assert torch.equal(found.state, h)


@pytest.mark.parametrize("solver", SOLVERS)
def test_samples_end_on_their_own(solver):
    """One contracts fast, one slowly, one is no number; none disturbs another."""
    slopes = torch.tensor([[0.1], [0.9], [torch.nan], [0.5]])
    weight, u = torch.eye(6), torch.randn(4, 6)

    def func(h):
        return slopes * F.linear(h, weight) + u

    found = solver(
        func, torch.zeros(4, 6), max_iter=200, tol=1e-5, stop_mode="rel", solve_dtype="bfloat16"
    )
    right = [0, 1, 3]
    want = u.double() / (1 - slopes.double())
    error = (found.state.double() - want).norm(dim=1) / want.norm(dim=1)
    assert (error[right] < 1e-4).all()
    assert (found.rel_lowest[right] < 1e-5).all()
    assert not found.rel_lowest[2] < 1e-5


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("solver", SOLVERS)
def test_states_of_any_structure(solver, batch_dim):
    a, b = nn.Linear(4, 4), nn.Linear(3, 3, dtype=torch.float64)
    for layer in (a, b):
        nn.init.orthogonal_(layer.weight, 0.5)
    start = {"a": torch.zeros(5, 4), "b": (torch.zeros(5, 3, dtype=torch.float64),)}

    def func(state):
        return {"a": a(state["a"]), "b": (b(state["b"][0]),)}

    found = solver(
        func, start, tol=1e-6, stop_mode="rel", batch_dim=batch_dim, solve_dtype="bfloat16"
    ).state
    for layer, leaf in ((a, found["a"]), (b, found["b"][0])):
        identity = torch.eye(len(layer.bias), dtype=torch.float64)
        want = torch.linalg.solve(identity - layer.weight.double(), layer.bias.double())
        assert leaf.dtype == layer.weight.dtype
        torch.testing.assert_close(leaf.double(), want.expand_as(leaf), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_a_map_keeps_of_its_first_evaluation_is_the_models_own(solver):
    kept = []

    def func(h):
        h = F.linear(h, torch.eye(6) * 0.5)
        if not kept:
            kept.append(torch.empty_like(h).bernoulli_(0.7) / 0.7)
        return h * kept[0] + 1

    solver(func, torch.zeros(3, 6), solve_dtype="bfloat16")
    assert kept[0].dtype == torch.float32


def test_a_part_of_a_map_that_switches_autocast_off_stays_in_full_precision():
    seen = []

    def func(h):
        h = F.linear(h, torch.eye(6) * 0.5)
        with torch.autocast("cpu", enabled=False):
            h = F.linear(h.float(), torch.eye(6))
            seen.append(h.dtype)
        return h + 1

    found = fixed_point(func, torch.zeros(3, 6), tol=1e-6, solve_dtype="bfloat16")
    assert set(seen) == {torch.float32}
    torch.testing.assert_close(found.state, torch.full((3, 6), 2.0), rtol=0, atol=1e-5)


def test_no_weight_that_was_cast_without_autograd_is_left_behind():
    """Some versions of PyTorch keep those for evaluations with autograd, which got no gradient."""
    layer = nn.Linear(6, 6)
    nn.init.orthogonal_(layer.weight, 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            fixed_point(layer, torch.zeros(3, 6), solve_dtype="bfloat16")
        layer(torch.ones(3, 6)).sum().backward()
    assert layer.weight.grad is not None


class Casts(TorchDispatchMode):
    """Counts how often a tensor is cast."""

    def __init__(self, tensor):
        super().__init__()
        self.address, self.count = tensor.data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() == self.address:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_weight_is_cast_as_often_as_in_one_autocast(solver):
    func = Linear()
    with Casts(func.weight) as solve:
        solver(func, func.start, tol=1e-5, stop_mode="rel", solve_dtype="bfloat16")
    with Casts(func.weight) as one, torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(sum(func.evaluations)):
            func(func.start)
    assert solve.count == one.count >= 1


@pytest.mark.parametrize("case", ["float64", "bfloat16", "autocast"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_where_autocast_changes_nothing_the_solve_is_as_without(solver, case):
    dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(case, torch.float32)
    weight, evaluations = torch.eye(6, dtype=dtype) * 0.5, []

    def func(h):
        evaluations.append(1)
        return F.linear(h, weight) + 1

    def solved(**options):
        evaluations.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case == "autocast"):
            found = solver(func, torch.zeros(3, 6, dtype=dtype), **options)
        return found, len(evaluations)

    want, n = solved()
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        for _ in range(3):
            found, taken = solved(solve_dtype="bfloat16")
            assert taken == n
            assert torch.equal(found.state, want.state)
            assert torch.equal(found.rel_trace, want.rel_trace)
    assert [warning.category for warning in given] == [dpp.AssumptionWarning]
    assert "solve_dtype=torch.bfloat16 has no effect" in str(given[0].message)


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_samples(solver):
    found = solver(lambda h: 0.5 * h, torch.zeros(0, 6), solve_dtype="bfloat16")
    assert found.state.shape == (0, 6)


@pytest.mark.parametrize(
    "wrong", ["float8", "fp16", "float32", 16, torch.float32, True, [], "x" * 99]
)
@pytest.mark.parametrize("solver", SOLVERS)
def test_what_is_no_dtype_to_solve_in(solver, wrong):
    with pytest.raises(ValueError, match=r"solve_dtype=.*expected None .*'bfloat16', 'float16'"):
        solver(torch.cos, torch.zeros(2, 3), solve_dtype=wrong)


def test_what_needs_more_than_the_end_is_refused():
    with pytest.raises(ValueError, match="solve_dtype='bfloat16' with keep_inverse=True"):
        broyden(torch.cos, torch.zeros(2, 3), keep_inverse=True, solve_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"solve_dtype='bfloat16' with sample_at=\[3, 9\]"):
        anderson(torch.cos, torch.zeros(2, 3), sample_at=[3, 9], solve_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"sample_at=\[4\]: .*expected .*\[50\]"):
        anderson(torch.cos, torch.zeros(2, 3), sample_at=[4], solve_dtype="bfloat16")
    last = anderson(torch.cos, torch.zeros(2, 3), sample_at=[50], solve_dtype="bfloat16")
    assert len(last.sampled) == 1
    assert torch.equal(last.sampled[0], last.state)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_compiled_map_is_compiled_once_for_each_precision(solver):
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    weight = torch.eye(6) * 0.5
    func = torch.compile(lambda h: torch.tanh(F.linear(h, weight) + 1), backend=backend)
    torch.compiler.reset()
    wants = solver(lambda h: torch.tanh(F.linear(h, weight) + 1), torch.zeros(3, 6), tol=1e-6)
    for _ in range(3):
        found = solver(func, torch.zeros(3, 6), tol=1e-6, solve_dtype="bfloat16")
        torch.testing.assert_close(found.state, wants.state, rtol=1e-4, atol=1e-5)
        assert len(graphs) == 2


@pytest.mark.parametrize("solver", SOLVERS)
def test_in_inference_mode_and_looking_rarely(solver):
    func = Linear()
    with torch.inference_mode():
        found = solver(
            func, func.start, tol=1e-5, stop_mode="rel", check_every=4, solve_dtype="bfloat16"
        )
    assert func.error(found.state).max() < 1e-5 / (1 - 0.6)


def test_rounding_stops_where_residuals_stop_falling():
    """Of a map with noise of its own, which no solve gets below."""
    generator = torch.Generator().manual_seed(0)
    evaluations = []

    def func(h):
        evaluations.append(1)
        return 0.5 * h + 1 + 0.1 * torch.randn(h.shape, generator=generator)

    for rounding, stops in ((0.0, False), (1e-3, True)):
        evaluations.clear()
        fixed_point(func, torch.zeros(2, 50), max_iter=300, tol=1e-6, rounding=rounding)
        assert (len(evaluations) < 60) == stops
