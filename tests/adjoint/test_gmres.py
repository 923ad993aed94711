"""GMRES on dense matrices: how few products, how accurate, and where J has an eigenvalue of one."""

from __future__ import annotations

import pytest
import torch

from deq_phantom_plugin.adjoint.gmres import gmres

pytestmark = pytest.mark.numerics

BATCH = 6


def matrix(kind, size, seed=0):
    """J of a given kind, in float64."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5
    symmetric = random + random.mT
    symmetric = symmetric / torch.linalg.eigvalsh(symmetric).abs().max()
    orthogonal = torch.linalg.qr(random).Q
    low_rank = orthogonal[:, :3] @ torch.diag(random[0, :3] * 2) @ orthogonal[:, :3].mT
    return {
        "random": random,
        "small": 0.05 * random,
        "symmetric": 0.99 * symmetric,
        "rotation": 0.9 * orthogonal,
        "nilpotent": 0.9 * torch.diag(torch.ones(size - 1, dtype=torch.float64), 1),
        "low rank": low_rank,
        "zero": 0 * random,
    }[kind]


def right_side(size, dtype, seed=1):
    generator = torch.Generator().manual_seed(seed)
    rhs = torch.randn(BATCH, size, generator=generator, dtype=torch.float64).to(dtype)
    return rhs / rhs.norm(dim=1, keepdim=True)


def least_residuals(j, rhs, n):
    """The least ||rhs - (I - J) x|| over n Krylov vectors, by dense least squares."""
    a = torch.eye(len(j), dtype=j.dtype) - j
    found = []
    for b in rhs:
        basis = [b]
        for _ in range(n - 1):
            basis.append(a @ basis[-1] / (a @ basis[-1]).norm())
        image = a @ torch.stack(basis, dim=1)
        weights = torch.linalg.lstsq(image, b[:, None], driver="gelsd").solution
        found.append((image @ weights - b[:, None]).norm())
    return torch.stack(found)


KINDS = ["random", "small", "symmetric", "rotation", "nilpotent", "low rank", "zero"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_residual_is_the_least_of_its_krylov_space(kind):
    j, rhs = matrix(kind, 9), right_side(9, torch.float64)
    for n in (2, 4, 6):
        found = gmres(lambda x: x @ j.mT, rhs, 1e-13, n + 1)
        want = least_residuals(j, rhs, n)
        torch.testing.assert_close(found.residual, want, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 7, 60])
def test_accurate_to_its_dtype(kind, size, dtype):
    j, rhs = matrix(kind, size).to(dtype), right_side(size, dtype)
    tol = 1e-5 if dtype == torch.float32 else 1e-12
    found = gmres(lambda x: x @ j.mT, rhs, tol, 200)
    j, rhs = j.double(), rhs.double()
    want = torch.linalg.solve(torch.eye(size, dtype=torch.float64) - j, rhs.mT).mT
    assert found.converged
    residual = (rhs - found.x.double() + found.x.double() @ j.mT).norm(dim=1)
    torch.testing.assert_close(found.residual.double(), residual, rtol=0.05, atol=0.05 * tol)
    error = (found.x.double() - want).norm(dim=1) / want.norm(dim=1)
    condition = torch.linalg.cond(torch.eye(size, dtype=torch.float64) - j)
    assert error.max() <= 1.1 * tol * condition


def test_a_tolerance_that_cannot_be_reached_costs_no_accuracy():
    """A cycle ends where rounding does, long before its numbers overflow."""
    j, rhs = matrix("small", 80), right_side(80, torch.float32)
    found = gmres(lambda x: x @ j.mT.float(), rhs, 1e-30, 120)
    assert not found.converged
    assert found.at_rounding.all()  # and no product is spent on what they cannot improve
    assert found.residual.max() < 2e-7


def test_few_eigenvalues_take_few_products():
    # The Krylov space of a matrix with three eigenvalues besides one has four dimensions.
    j, rhs = matrix("low rank", 50), right_side(50, torch.float64)
    found = gmres(lambda x: x @ j.mT, rhs, 1e-10, 50)
    assert found.converged
    assert found.n_vjp <= 5


def test_an_eigenvalue_of_one_leaves_what_cannot_be_solved():
    j = torch.diag(torch.tensor([1.0, 0.5, 0.2, -0.3], dtype=torch.float64))
    rhs = right_side(4, torch.float64)
    found = gmres(lambda x: x @ j, rhs, 1e-8, 60)
    assert torch.isfinite(found.x).all()
    torch.testing.assert_close(found.residual, rhs[:, 0].abs(), rtol=1e-6, atol=1e-9)
    nothing = gmres(lambda x: x, rhs, 1e-8, 60)
    assert torch.isfinite(nothing.x).all()
    torch.testing.assert_close(nothing.residual, torch.ones(BATCH, dtype=torch.float64))


def test_samples_stop_on_their_own():
    j = torch.stack([matrix(kind, 12) for kind in KINDS[:BATCH]])
    rhs = right_side(12, torch.float64)
    apply = lambda x: (j @ x[:, :, None]).squeeze(2)  # noqa: E731
    together = gmres(apply, rhs, 1e-9, 60)
    assert (together.residual <= 1e-9).all()
    for i in range(BATCH):
        alone = gmres(lambda x, i=i: x @ j[i].mT, rhs[i : i + 1], 1e-9, 60)
        torch.testing.assert_close(together.x[i], alone.x[0], rtol=1e-7, atol=1e-7)
