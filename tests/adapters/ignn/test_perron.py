"""The Perron-Frobenius eigenvalue and its slope, against dense algebra and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import deq_phantom_plugin as dpp
from deq_phantom_plugin.adapters.ignn import perron
from deq_phantom_plugin.adapters.ignn.perron import PerronEigenvalue


def ring(size, seed=0):
    """A directed cycle with weights at random: its eigenvalue is their geometric mean."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    nodes = torch.arange(size)
    matrix[nodes, (nodes + 1) % size] = 0.5 + torch.rand(
        size, dtype=torch.float64, generator=generator
    )
    return matrix


def chain(size):
    matrix = torch.zeros(size, size, dtype=torch.float64)
    nodes = torch.arange(size - 1)
    matrix[nodes, nodes + 1] = matrix[nodes + 1, nodes] = 1
    return matrix


def grid(side):
    eye = torch.eye(side, dtype=torch.float64)
    return torch.kron(chain(side), eye) + torch.kron(eye, chain(side))


def sparse(size, entries, seed=0):
    generator = torch.Generator().manual_seed(seed)
    places = tuple(torch.randint(size, (2, entries), generator=generator))
    weights = torch.randn(entries, dtype=torch.float64, generator=generator)
    return torch.zeros(size, size, dtype=torch.float64).index_put(places, weights, accumulate=True)


def joined(first, second, bridge=1.0):
    """Two matrices, of which the first feeds the second."""
    matrix = torch.block_diag(first, second)
    matrix[len(first) - 1, len(first)] = bridge
    return matrix


def scaled(matrix):
    factors = torch.logspace(-6, 6, len(matrix), dtype=torch.float64)
    return factors[:, None] * matrix / factors


def of(matrix):
    row, column = matrix.nonzero().unbind(1)
    return PerronEigenvalue(row, column, matrix[row, column], len(matrix))


def slope(matrix):
    row, column = matrix.nonzero().unbind(1)
    dense = torch.zeros_like(matrix)
    dense[row, column] = of(matrix).slope
    return dense


def radius(matrix):
    return torch.linalg.eigvals(matrix.abs()).abs().max()


SIMPLE = {
    "directed": sparse(30, 150),
    "undirected": sparse(20, 60) + sparse(20, 60).mT,
    "cycle": ring(12),
    "long cycle": ring(150),
    "chain": chain(40),
    "long chain": chain(300),
    "weighted chain": chain(60) * (sparse(60, 3600) + 0.1),
    "grid": grid(9),
    "bipartite": torch.kron(torch.tensor([[0.0, 1], [1, 0]]), torch.rand(5, 5) + 0.1).double(),
    "two alike": torch.block_diag(chain(30), 0.9999 * chain(30)),
    "one feeds another": joined(sparse(12, 60), 0.999 * sparse(12, 60)),
    "dumbbell": joined(torch.ones(5, 5).double(), 1.001 * torch.ones(5, 5).double())
    + joined(torch.zeros(5, 5).double(), torch.zeros(5, 5).double()).mT,
    "badly scaled": scaled(sparse(25, 120)),
}


@pytest.mark.parametrize("name", SIMPLE)
def test_value_and_slope_are_those_of_the_dense_matrix(name):
    matrix = SIMPLE[name].clone().requires_grad_()
    expected = radius(matrix)
    (reference,) = torch.autograd.grad(expected, matrix)
    found = of(matrix.detach())
    assert found.value.item() == pytest.approx(expected.item(), rel=1e-10)
    # What is no entry has no slope here; the dense one would have the size of its eigenvectors.
    reference = torch.where(matrix.detach() != 0, reference, 0)
    error = (slope(matrix.detach()) - reference).abs() * matrix.detach().abs()
    assert error.max() < 1e-7 * expected


def radii_of_components(matrix):
    """The spectral radii of the strongly connected components, ascending, from a dense closure."""
    paths = torch.linalg.matrix_power(torch.eye(len(matrix)) + matrix.sign().float(), len(matrix))
    together = torch.unique((paths > 0) & (paths.mT > 0), dim=0)
    return sorted(radius(matrix[one][:, one]).item() for one in together)


@given(size=st.integers(1, 12), density=st.floats(0.3, 4), seed=st.integers(0, 2**31))
def test_any_directed_graph_with_parallel_and_negative_edges(size, density, seed):
    generator = torch.Generator().manual_seed(seed)
    row, column = torch.randint(size, (2, math.ceil(density * size)), generator=generator)
    weight, step = torch.randn(2, len(row), dtype=torch.float64, generator=generator)

    def dense(weight):
        zeros = weight.new_zeros(size, size)
        return zeros.index_put((row, column), weight, accumulate=True).abs()

    found = PerronEigenvalue(row, column, weight, size)
    *others, expected = radii_of_components(dense(weight))
    assert found.value.item() == pytest.approx(expected, rel=1e-10)
    if expected == 0:
        assert not found.attached(weight).requires_grad
        return
    # The eigenvalue of c A is c times that of A (Euler).
    assert (found.slope @ weight).item() == pytest.approx(expected, rel=1e-9)
    entries = dense(weight)
    if entries[entries > 0].min() > 1e-3 and expected - max(others, default=0) > 1e-3:  # no kinks
        up, down = (radii_of_components(dense(weight + e * step))[-1] for e in (1e-6, -1e-6))
        assert (found.slope @ step).item() == pytest.approx((up - down) / 2e-6, rel=1e-5, abs=1e-7)


def test_large_graphs_have_a_krylov_space():
    # 40 x 40 nodes are more than are solved densely. Product of two chains, in closed form.
    side = 40
    matrix = grid(side)
    assert side**2 > perron._LARGEST_DENSE
    assert of(matrix).value.item() == pytest.approx(4 * math.cos(math.pi / (side + 1)), rel=1e-11)
    wave = torch.sin(math.pi * torch.arange(1, side + 1).double() / (side + 1))
    vector = torch.outer(wave, wave).flatten()
    expected = matrix * torch.outer(vector, vector) / (vector @ vector)
    torch.testing.assert_close(slope(matrix), expected, rtol=1e-6, atol=1e-12)


def test_where_two_components_are_the_same_the_slope_is_that_of_one():
    matrix = torch.block_diag(chain(6), chain(6), 0.5 * chain(6))
    found = slope(matrix)
    one = slope(chain(6))
    halves = (found[:6, :6], found[6:12, 6:12])
    assert any(
        torch.allclose(half, one) and not other.any() for half, other in (halves, halves[::-1])
    )
    assert not found[12:].any()


def test_equal_components_in_a_row():
    # A Jordan block: power iteration on the whole of it takes forever.
    matrix = torch.eye(40, dtype=torch.float64) + torch.diag(torch.ones(39).double(), 1)
    assert of(matrix).value == 1
    assert slope(matrix).sum() == 1
    same = joined(sparse(8, 30), sparse(8, 30))
    assert of(same).value.item() == pytest.approx(radius(sparse(8, 30)).item(), rel=1e-11)


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e200])
def test_weights_of_any_size(scale):
    matrix = sparse(10, 40)
    found = of(scale * matrix)
    assert found.value.item() == pytest.approx(scale * of(matrix).value.item(), rel=1e-11)
    torch.testing.assert_close(found.slope, of(matrix).slope)


def test_edges_that_cancel_are_none():
    weight = torch.tensor([1.0, 2.0, -2.0, 3.0], dtype=torch.float64)
    row, column = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 1, 0])
    found = PerronEigenvalue(row, column, weight, 2)
    assert found.value == 1
    assert found.slope.tolist() == [1, 0, 0, 0]


def test_no_cycles_no_eigenvalue():
    none = torch.empty(0, dtype=torch.long)
    for size in (0, 3):
        weight = torch.empty(0, dtype=torch.float64, requires_grad=True)
        found = PerronEigenvalue(none, none, weight, size)
        assert found.value == 0
        assert not found.attached(weight).requires_grad
    assert of(torch.triu(torch.ones(9, 9).double(), 1)).value == 0


def test_the_value_is_a_bound_and_the_slope_warns_where_the_iteration_stops_early(monkeypatch):
    monkeypatch.setattr(perron, "_MAX_TURNS", 1)
    matrix = chain(50)
    found = of(matrix)
    expected = 2 * math.cos(math.pi / 51)
    assert expected < found.value <= 2
    with pytest.warns(dpp.ConvergenceWarning, match="gradient of lambda_pf in the edge weights"):
        slope_of_it = found.slope
    assert torch.isfinite(slope_of_it).all()


def test_a_second_derivative_is_refused():
    row, column = sparse(6, 20).nonzero().unbind(1)
    weight = sparse(6, 20)[row, column].requires_grad_()
    value = PerronEigenvalue(row, column, weight, 6).attached(weight)
    with pytest.raises(RuntimeError, match="lambda_pf, the Perron-Frobenius eigenvalue"):
        torch.autograd.grad(value, weight, create_graph=True)
