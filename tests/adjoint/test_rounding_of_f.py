"""Adjoint solves of an F that computes in 16 bits end where its own rounding is."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import deq_phantom_plugin as dpp
from deq_phantom_plugin.adjoint import SOLVERS, solve
from deq_phantom_plugin.adjoint.progress import Progress

LIMIT = 60


def coarse(dtype, size=64, batch=16, radius=0.6, normal=True):
    """tanh(W h + x) computed in 16 bits on a state in float32, and its equilibrium."""
    weight = torch.randn(size, size)
    weight = torch.linalg.qr(weight).Q if normal else weight / torch.linalg.matrix_norm(weight, 2)
    weight = (radius * weight if normal else 1.6 * weight).requires_grad_()
    x = torch.randn(batch, size)

    def func(h):
        with torch.autocast("cpu", dtype=dtype):
            return torch.tanh(torch.nn.functional.linear(h, weight) + x).to(h.dtype)

    h = torch.zeros(batch, size)
    with torch.no_grad():
        for _ in range(40):
            h = func(h)
    return func, h


def attached(func, h, spec, **told):
    stats = []
    context = dpp.Context(batch_dim=0, monitor=stats.append, **told)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        dpp.attach(func, h, spec, context).square().mean().backward()
    return stats[0], [str(warning.message) for warning in said]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solve_ends_at_the_rounding_of_f_and_says_nothing(solver, dtype):
    func, h = coarse(dtype)
    stats, said = attached(func, h, f"ift(solver={solver!r}, max_iter={LIMIT})")
    assert said == []
    assert stats.n_vjp <= LIMIT / 2
    # One product is rounded to half an eps of itself in each of its few steps; the g that it is
    # subtracted from is at most 1 / (1 - 0.6) times v.
    assert stats.residual.max() <= 10 * torch.finfo(dtype).eps / (1 - 0.6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", sorted({*SOLVERS} - {"fixed_point"}))
def test_a_small_and_far_from_normal_map_does_not_use_up_its_products(solver, dtype):
    """The residual that bicgstab carries along falls below F's rounding, and the true one rises."""
    func, h = coarse(dtype, size=24, batch=6, normal=False)
    stats, said = attached(func, h, f"ift(solver={solver!r})")
    assert said == []
    assert stats.n_vjp < dpp.IFT.max_iter


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_tolerance_of_the_users_that_is_out_of_reach_is_said(solver):
    func, h = coarse(torch.bfloat16)
    stats, said = attached(func, h, f"ift(solver={solver!r}, tol=1e-6, max_iter={LIMIT})")
    assert len(said) == 1
    assert "higher precision" in said[0]
    assert "tol=1e-06" in said[0]
    assert stats.n_vjp < LIMIT


@pytest.mark.parametrize("solver", SOLVERS)
def test_too_few_products_are_not_taken_for_rounding(solver):
    func, h = coarse(torch.bfloat16, radius=0.98)
    _, said = attached(func, h, f"ift(solver={solver!r}, max_iter=4)")
    assert len(said) == 1
    assert "Raise max_iter" in said[0]


@given(
    st.sampled_from(sorted(SOLVERS)),
    st.sampled_from([torch.float32, torch.float64]),
    st.floats(0.1, 0.97),
    st.integers(0, 2**31),
)
def test_a_linear_map_is_solved_to_its_tolerance_as_before(solver, dtype, radius, seed):
    """Nothing stops early where products are as exact as the dtype: slow solves go on."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    matrix = (radius * torch.linalg.qr(matrix).Q).to(dtype)
    v = torch.randn(3, 12, generator=generator, dtype=torch.float64).to(dtype)
    tol = 1e3 * torch.finfo(dtype).eps
    (g,), solution = solve(
        lambda w: [w[0] @ matrix], [v], solver=solver, tol=tol, max_vjp=3000, batch_dim=0
    )
    if solver == "bicgstab" and not solution.converged:  # which breaks down on rotations
        assert not solution.at_rounding.any()
        return
    assert solution.converged
    rest = v - g + g @ matrix
    assert bool((rest.norm(dim=1) <= 2 * tol * v.norm(dim=1)).all())


def test_samples_that_depend_on_one_another_are_not_taken_for_rounding():
    """A residual that does not fall for another reason is still said."""
    torch.manual_seed(0)
    mix = 0.9 * torch.linalg.qr(torch.randn(8, 8)).Q
    u = torch.randn(8, 3)
    h = torch.linalg.solve(torch.eye(8) - mix, u)
    _, said = attached(lambda h: mix @ h + 0 * h.requires_grad_() + u, h, "ift(max_iter=12)")
    assert len(said) == 1
    assert "batch_dim" in said[0]


def test_a_sample_that_stops_beside_its_best_keeps_that():
    """Where others go on; and goes on itself once they reach into it."""
    rhs = torch.ones(2, 1, dtype=torch.float64)
    progress = Progress(lambda x: (0.5 * x).bfloat16().double(), rhs, tol=1e-8, max_vjp=99)

    def record(*errors):
        x = 2 + torch.tensor(errors, dtype=torch.float64)[:, None]
        assert not progress.record(x, rhs - x + progress.apply(x))

    for other in (0.8, 0.7, 0.6, 0.5, 0.45):
        record(1e-4, other)
    record(2e-3, 0.4)  # by now it is time to look at what was gained
    assert progress.active.tolist() == [False, True]
    record(2e-3, 0.35)
    assert progress.active.tolist() == [False, True]
    assert progress.solution().x[0].item() == 2 + 1e-4
    record(0.5, 0.3)
    assert progress.active.tolist() == [True, True]
