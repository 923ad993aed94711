"""DESIGN section 1: what must hold on contractions drawn at random, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import deq_phantom_plugin as dpp
from conftest import equilibria
from deq_phantom_plugin.adjoint import SOLVERS
from deq_phantom_plugin.testing import make_equilibrium

ks = st.integers(1, 12)
lams = st.floats(0.05, 1.0)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


def dense_gradient(equilibrium, g_of_v) -> torch.Tensor:
    """The gradient (dF/dz)^T g(v) from dense matrices alone, no code of ours."""
    leaves = equilibrium.leaves
    v = torch.cat([torch.linspace(-1, 2, leaf.numel(), dtype=torch.float64) for leaf in leaves])
    g = g_of_v(equilibrium.jacobian(), v)
    out = equilibrium.func(equilibrium.state)
    flat = torch.cat([leaf.flatten() for leaf in torch.utils._pytree.tree_leaves(out)])
    grads = torch.autograd.grad(flat, equilibrium.params, g)
    return torch.cat([grad.flatten() for grad in grads])


def exact_g(jacobian: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.linalg.solve(torch.eye(len(v), dtype=v.dtype) - jacobian.mT, v)


def neumann_g(k: int, lam: float):
    def g(jacobian: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        damped = lam * jacobian.mT + (1 - lam) * torch.eye(len(v), dtype=v.dtype)
        return lam * sum(torch.linalg.matrix_power(damped, t) @ v for t in range(k))

    return g


def to_params(equilibrium) -> torch.Tensor:
    """dF/dtheta with respect to all parameters, shape (d_theta, d_h), row by row."""
    out = equilibrium.func(equilibrium.state)
    elements = torch.cat([leaf.flatten() for leaf in torch.utils._pytree.tree_leaves(out)])
    columns = [
        torch.cat(
            [d.flatten() for d in torch.autograd.grad(e, equilibrium.params, retain_graph=True)]
        )
        for e in elements
    ]
    return torch.stack(columns, dim=1)


@given(equilibria(), ks, lams)
def test_upg_and_npg_give_the_same_gradient(drawn, k, lam):
    equilibrium, context = drawn
    upg = equilibrium.gradient(dpp.UPG(k, lam), context)
    npg = equilibrium.gradient(dpp.NPG(k, lam), context)
    assert relative(upg, npg) < 1e-10
    assert relative(npg, dense_gradient(equilibrium, neumann_g(k, lam))) < 1e-10


@given(equilibria(), ks, lams)
def test_checkpointed_upg_gives_the_same_gradient(drawn, k, lam):
    equilibrium, context = drawn
    plain = equilibrium.gradient(dpp.UPG(k, lam), context)
    assert torch.equal(plain, equilibrium.gradient(dpp.UPG(k, lam, checkpoint=True), context))


@given(equilibria())
def test_one_undamped_step_is_jfb(drawn):
    equilibrium, context = drawn
    jfb = equilibrium.gradient("jfb", context)
    assert relative(equilibrium.gradient("upg(k=1, lam=1)", context), jfb) < 1e-12
    assert relative(equilibrium.gradient("npg(k=1, lam=1)", context), jfb) < 1e-12
    assert relative(jfb, dense_gradient(equilibrium, lambda jacobian, v: v)) < 1e-12


@given(equilibria(), st.floats(0.3, 1.0))
def test_phantom_gradients_tend_to_the_exact_one_as_fast_as_b_to_the_k(drawn, lam):
    """||g_k - g|| = ||B^k g|| <= ||B||^k ||g||, and ||dF/dz|| times that in the parameters."""
    equilibrium, context = drawn
    jacobian = equilibrium.jacobian()
    damped = lam * jacobian + (1 - lam) * torch.eye(len(jacobian), dtype=torch.float64)
    norm = float(torch.linalg.matrix_norm(damped, 2))
    exact = equilibrium.gradient("exact", context)
    leaves = equilibrium.leaves
    v = torch.cat([torch.linspace(-1, 2, leaf.numel(), dtype=torch.float64) for leaf in leaves])
    g = torch.linalg.vector_norm(exact_g(jacobian, v))
    amplification = torch.linalg.matrix_norm(to_params(equilibrium), 2)
    for k in (1, 2, 5, 20, 60):
        error = torch.linalg.vector_norm(equilibrium.gradient(dpp.NPG(k, lam), context) - exact)
        assert error <= amplification * norm**k * g * (1 + 1e-9) + 1e-11 * amplification * g


def test_the_rate_is_the_spectral_radius_not_the_norm():
    equilibrium = make_equilibrium([(1, 6)], norm=1.2, seed=3)
    jacobian = equilibrium.jacobian()
    radius = float(torch.linalg.eigvals(jacobian).abs().max())
    assert radius < 0.9
    exact = equilibrium.gradient("exact")
    errors = [
        float(torch.linalg.vector_norm(equilibrium.gradient(dpp.NPG(k, 1.0)) - exact))
        for k in (10, 40)
    ]
    assert (errors[1] / errors[0]) ** (1 / 30) == pytest.approx(radius, rel=0.03)


@given(equilibria())
def test_exact_is_the_dense_solve(drawn):
    equilibrium, context = drawn
    exact = equilibrium.gradient("exact", context)
    assert relative(exact, dense_gradient(equilibrium, exact_g)) < 1e-10


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@given(drawn=equilibria(), tol=st.sampled_from([1e-4, 1e-8, 1e-11]))
def test_ift_is_exact_within_its_tolerance(solver, drawn, tol):
    equilibrium, context = drawn
    jacobian = equilibrium.jacobian()
    inverse = torch.linalg.inv(torch.eye(len(jacobian), dtype=torch.float64) - jacobian.mT)
    bound = tol * float(torch.linalg.matrix_norm(inverse, 2))
    reports = []
    context = dpp.Context(batch_dim=context.batch_dim, monitor=reports.append)
    spec = dpp.IFT(solver=solver, tol=tol, max_iter=400)
    # The gradient with respect to an additive injection into F's result is g itself.
    leaves, structure = torch.utils._pytree.tree_flatten(equilibrium.state)
    adds = [torch.zeros_like(leaf, requires_grad=True) for leaf in leaves]

    def func(state):
        out = torch.utils._pytree.tree_leaves(equilibrium.func(state))
        return torch.utils._pytree.tree_unflatten(
            [o + a for o, a in zip(out, adds, strict=True)], structure
        )

    attached = dpp.attach(func, equilibrium.state, grad=spec, context=context)
    found = torch.autograd.grad(equilibrium.linear_loss(attached), adds)
    g = torch.cat([leaf.flatten() for leaf in found])
    v = torch.cat([torch.linspace(-1, 2, leaf.numel(), dtype=torch.float64) for leaf in leaves])
    error = torch.linalg.vector_norm(g - exact_g(jacobian, v))
    assert error <= bound * torch.linalg.vector_norm(v) * (1 + 1e-9) + 1e-13
    assert reports[0].residual.max() <= tol
    assert reports[0].n_vjp <= 400


@pytest.mark.parametrize(("eigenvalue", "converges"), [(1.4, False), (-1.4, True), (1.4j, True)])
def test_damping_helps_where_the_spectrum_allows(eigenvalue, converges):
    """DESIGN section 1: 1.4 diverges for every lam; -1.4 and +-1.4i are damped into the circle."""
    z = complex(eigenvalue)
    matrix = torch.tensor([[z.real, -z.imag], [z.imag, z.real]], dtype=torch.float64)
    inject = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
    state = torch.linalg.solve(torch.eye(2, dtype=torch.float64) - matrix, inject[0].detach())

    def func(h):
        return h @ matrix.mT + inject

    radius = dpp.spectral_radius(func, state[None], lam=0.4)
    assert (radius < 1).all() == converges
    errors = []
    for k in (10, 60):
        out = dpp.attach(func, state[None], grad=dpp.NPG(k, 0.4))
        (got,) = torch.autograd.grad(out[0, 0], inject)
        out = dpp.attach(func, state[None], grad="exact")
        (want,) = torch.autograd.grad(out[0, 0], inject)
        errors.append(relative(got, want))
    assert (errors[1] < errors[0] / 10) == converges
