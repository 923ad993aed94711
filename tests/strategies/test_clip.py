"""Clipped products: against dense recursions, and the same numbers where nothing is clipped."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import deq_phantom_plugin as dpp
from deq_phantom_plugin.adjoint import Clip
from deq_phantom_plugin.testing import make_equilibrium

INDEPENDENT = dpp.Context(batch_dim=0)
COUPLED = dpp.Context(batch_dim=None)


class Linear:
    """h = J h + u, a J for each of three samples: whatever J is, the equilibrium is known."""

    def __init__(self, radii=(0.5, 1.2, 4.0), width=5, dtype=torch.float64):
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(len(radii), width, width, generator=generator, dtype=torch.float64)
        norms = torch.linalg.matrix_norm(drawn, 2)
        scales = torch.tensor(radii, dtype=torch.float64) / norms
        self.jacobians = (drawn * scales[:, None, None]).to(dtype)
        self.v = torch.randn(len(radii), width, generator=generator, dtype=torch.float64).to(dtype)
        self.inject = torch.zeros_like(self.v, requires_grad=True)

    def func(self, h):
        return (self.jacobians @ h[:, :, None]).squeeze(2) + self.inject

    def g(self, spec, context=INDEPENDENT, v=None):
        """What the strategy makes of v: dF/du is the identity."""
        attached = dpp.attach(self.func, torch.zeros_like(self.v), spec, context)
        return torch.autograd.grad(attached, self.inject, self.v if v is None else v)[0]

    def product(self, g):
        return (self.jacobians.mT @ g[:, :, None]).squeeze(2)


def clipped(product, v, limit, together=False):
    """The rule, written out: no sample's product is longer than `limit` times its v."""
    product, rows = product.clone(), [slice(None)] if together else range(len(v))
    for row in rows:
        length, bound = product[row].norm(), limit * v[row].norm()
        if length > bound:
            product[row] *= bound / length
    return product


def by_recursion(problem, k, lam, limit, together=False):
    g = v = problem.v
    for _ in range(k - 1):
        g = v + lam * clipped(problem.product(g), v, limit, together) + (1 - lam) * g
    return lam * g


class Operators(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


# --- npg --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "lam", "clip"), [(2, 1.0, 1.0), (6, 0.7, 0.9), (9, 1.0, 2.5)])
@pytest.mark.parametrize("context", [INDEPENDENT, COUPLED], ids=["independent", "coupled"])
def test_npg_is_the_recursion_with_each_product_clipped(k, lam, clip, context):
    problem = Linear()
    want = by_recursion(problem, k, lam, clip, together=context.batch_dim is None)
    assert (want - by_recursion(problem, k, lam, 1e9)).norm() > 0.1 * want.norm()
    got = problem.g(f"npg(k={k}, lam={lam}, clip={clip})", context)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_npg_of_two_terms_is_the_onestep_of_attractor():
    """u = v + J^T v, the product scaled down to ||v||: its formula, in a line."""
    problem = Linear()
    v, image = problem.v, problem.product(problem.v)
    shrink = (v.norm(dim=1) / image.norm(dim=1)).clamp(max=1)
    assert (shrink < 1).tolist() == [False, False, True]
    got = problem.g("npg(k=2, lam=1.0, clip=1.0)")
    torch.testing.assert_close(got, v + shrink[:, None] * image, rtol=1e-14, atol=1e-14)


@pytest.mark.filterwarnings("ignore::deq_phantom_plugin.ConvergenceWarning")
@pytest.mark.parametrize("lam", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("clip", [0.3, 5.0])
def test_g_is_never_longer_than_one_plus_clip(lam, clip):
    problem = Linear((0.5, 1.2, 1e3))
    for spec in (f"npg(k=90, lam={lam}, clip={clip})", f"ift(solver='fixed_point', clip={clip})"):
        longest = problem.g(spec).norm(dim=1) / problem.v.norm(dim=1)
        assert longest.max() <= (1 + clip) * (1 + 1e-12)


def test_the_norm_is_that_of_all_leaves_of_a_sample():
    """Of leaves that are 300 times as large as others, too, and along another dimension."""
    problem = Linear((0.5, 3.0, 3.0), width=5)
    scale = torch.tensor([1.0, 300, 1, 1, 300], dtype=torch.float64)

    def func(state):
        rows = torch.cat([state["a"].mT, state["b"].permute(1, 0, 2).reshape(3, 3)], dim=1)
        out = problem.func(rows / scale) * scale
        return {"a": out[:, :2].mT, "b": out[:, 2:].reshape(3, 1, 3).permute(1, 0, 2)}

    state = {"a": torch.zeros(2, 3).double(), "b": torch.zeros(1, 3, 3).double()}
    context = dpp.Context(batch_dim=1)
    attached = dpp.attach(func, state, "npg(k=3, lam=1.0, clip=1.0)", context)
    v = problem.v
    outputs, cotangents = [attached["a"], attached["b"]], [v[:, :2].mT, v[None, :, 2:]]
    (got,) = torch.autograd.grad(outputs, problem.inject, cotangents)
    g = v
    for _ in range(2):
        g = v + clipped(problem.product(g * scale) / scale, v, 1.0)
    torch.testing.assert_close(got, g * scale, rtol=1e-12, atol=1e-12)


def test_where_no_product_is_longer_every_bit_stays():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        problem = make_equilibrium([(3, 4), (3, 2)], list, norm=0.6, dtype=dtype)
        plain = problem.gradient("npg(k=7)", INDEPENDENT)
        assert torch.equal(problem.gradient("npg(k=7, clip=2.5)", INDEPENDENT), plain)


def test_a_wild_sample_does_not_change_the_others():
    calm, wild = Linear((0.5, 1.2, 0.3)), Linear((0.5, 1.2, 1e6))
    a, b = (problem.g("npg(k=9, lam=1.0, clip=1.0)") for problem in (calm, wild))
    assert torch.equal(a[:2], b[:2])
    assert bool(b.isfinite().all())
    assert b[2].norm() <= 2 * wild.v[2].norm() * (1 + 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_norms_of_16_bits_are_taken_in_32(dtype):
    """Where v has the norm 600, the sum of squares is beyond float16, whose largest is 65504."""
    problem = Linear((0.5, 1.2, 4.0), dtype=dtype)
    v = problem.v * 600
    got = problem.g("npg(k=2, lam=1.0, clip=1.0)", v=v)
    exact = Linear((0.5, 1.2, 4.0))
    exact.jacobians, exact.v = problem.jacobians.double(), v.double()
    assert bool(got.isfinite().all())
    want = by_recursion(exact, 2, 1.0, 1.0)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=4 * 600 * torch.finfo(dtype).eps)


def test_zero_and_what_is_not_finite():
    problem = Linear((0.5, 4.0, 4.0))
    v = problem.v.clone()
    v[0], v[1, 2] = 0, torch.nan
    got = problem.g("npg(k=4, lam=1.0, clip=1.0)", v=v)
    assert torch.equal(got[0], torch.zeros(5).double())
    assert bool(got[1].isnan().any())
    assert torch.equal(got[2], problem.g("npg(k=4, lam=1.0, clip=1.0)")[2])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_product_that_is_not_finite_is_not_clipped_into_a_finite_one(bad):
    problem = Linear()
    problem.jacobians[2, 1, 3] = bad
    got = problem.g("npg(k=3, lam=1.0, clip=1.0)")
    assert not bool(got[2].isfinite().all())
    assert torch.equal(got[:2], Linear().g("npg(k=3, lam=1.0, clip=1.0)")[:2])


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e22, 1e30])
def test_squares_neither_overflow_nor_vanish(size):
    """Squares of 1e-30 are zero in float32, and those of 1e30 infinite."""
    rows = torch.tensor([[3.0, 4.0], [0.3, 0.4]], dtype=torch.float32)
    clip = Clip(rows[:1].expand(2, 2) * size, 0.5)
    want = torch.tensor([[1.5, 2.0], [0.3, 0.4]], dtype=torch.float32)
    torch.testing.assert_close(clip(rows * size) / size, want, rtol=1e-6, atol=0)
    assert clip.n_clipped == 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_stays_what_it_is_and_does_not_count(bad):
    clip = Clip(torch.ones(3, 2), 0.5)
    rows = torch.tensor([[bad, 7.0], [3.0, 4.0], [0.1, bad]])
    want = rows.clone()
    want[1] *= 0.5 * 2**0.5 / 5
    torch.testing.assert_close(clip(rows), want, equal_nan=True)
    assert clip.n_clipped == 1


def test_complex_leaves_have_the_norm_of_their_pairs():
    factor = torch.tensor([[3j], [0.5 - 0.1j]], dtype=torch.complex128)
    inject = torch.zeros(2, 1, dtype=torch.complex128, requires_grad=True)
    state = torch.zeros(2, 1, dtype=torch.complex128)
    spec = "npg(k=2, lam=1.0, clip=1.0)"
    attached = dpp.attach(lambda h: factor * h + inject, state, spec, INDEPENDENT)
    v = torch.tensor([[3 + 4j], [1 - 2j]], dtype=torch.complex128)
    (got,) = torch.autograd.grad(attached, inject, v)
    want = v + torch.stack([-1j * v[0], factor[1].conj() * v[1]])
    torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


def test_adaptive_damping_and_clip_go_together():
    problem = Linear((0.5, 1.2, 4.0))
    radii = torch.linalg.eigvals(problem.jacobians).abs().amax(dim=1)
    lam = (1 / radii.clamp(min=1))[:, None]
    g = v = problem.v
    for _ in range(3):
        g = v + lam * clipped(problem.product(g), v, 0.8) + (1 - lam) * g
    got = problem.g("npg(k=4, lam='adaptive', clip=0.8)")
    torch.testing.assert_close(got, lam * g, rtol=1e-9, atol=1e-9)


def test_each_of_many_cotangents_has_a_bound_of_its_own():
    problem = Linear()
    attached = dpp.attach(
        problem.func, torch.zeros_like(problem.v), "npg(k=5, clip=0.7)", INDEPENDENT
    )
    many = torch.stack([problem.v, 1e3 * problem.v.flip(1)])
    (got,) = torch.autograd.grad(attached, problem.inject, many, is_grads_batched=True)
    want = [problem.g("npg(k=5, clip=0.7)", v=v) for v in many]
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-12, atol=1e-12)


# --- ift --------------------------------------------------------------------------------------

IFT = "ift(solver='fixed_point', tol=1e-12, max_iter=2000"


def symmetric(radii):
    """Jacobians of these spectral radii, whose largest eigenvalue is positive: all iterations end.

    One of a radius above 1 ends where the product is clipped.
    """
    problem = Linear(radii)
    for row, radius in enumerate(radii):
        basis = torch.linalg.qr(problem.jacobians[row]).Q
        values = radius * torch.tensor([1.0, 0.5, 0.3, 0.1, -0.2], dtype=torch.float64)
        problem.jacobians[row] = (basis * values) @ basis.mT
    return problem


def solved_by_hand(problem, limit, together=False):
    g = v = problem.v
    for _ in range(2000):
        g = v + clipped(problem.product(g), v, limit, together)
    return g


@pytest.mark.parametrize("context", [INDEPENDENT, COUPLED], ids=["independent", "coupled"])
@pytest.mark.filterwarnings("ignore::deq_phantom_plugin.ConvergenceWarning")
def test_ift_solves_the_equation_with_the_product_clipped(context):
    problem = symmetric((0.3, 0.6, 1.7))
    together = context.batch_dim is None
    want = solved_by_hand(problem, 2.0, together)
    again = problem.v + clipped(problem.product(want), problem.v, 2.0, together)
    torch.testing.assert_close(again, want, rtol=1e-12, atol=1e-12)  # it has ended
    got = problem.g(f"{IFT}, clip=2.0)", context)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_ift_is_the_implicit_gradient_where_no_product_is_longer_in_the_end(recwarn):
    """Dense, and bit for bit that without a clip where none is longer on the way either."""
    problem, told = symmetric((0.3, 0.6, 0.8)), []
    context = dpp.Context(batch_dim=0, monitor=told.append)
    system = torch.eye(5, dtype=torch.float64) - problem.jacobians.mT
    exact = torch.linalg.solve(system, problem.v)
    longest = (problem.product(exact).norm(dim=1) / problem.v.norm(dim=1)).max()
    plain = problem.g(f"{IFT})", context)
    assert torch.equal(problem.g(f"{IFT}, clip=9.0)", context), plain)
    near = problem.g(f"{IFT}, clip={1.0001 * float(longest)})", context)
    torch.testing.assert_close(near, exact, rtol=1e-9, atol=1e-9)
    assert [stats.n_clipped for stats in told] == [0, 0, 0]
    assert told[0].n_vjp == told[1].n_vjp
    assert not recwarn.list


def test_ift_tells_the_residual_of_the_system_itself_and_warns_once():
    problem, told = symmetric((0.3, 0.6, 1.7)), []
    context = dpp.Context(batch_dim=0, monitor=told.append)
    spec = f"{IFT}, clip=2.0)"
    with pytest.warns(dpp.ConvergenceWarning, match=r"1 of 3 samples .* products were clipped"):
        g = problem.g(spec, context)
    (stats,) = told
    left = problem.v - g + problem.product(g)
    want = left.norm(dim=1) / problem.v.norm(dim=1)
    torch.testing.assert_close(stats.residual, want, rtol=1e-6, atol=1e-11)
    assert stats.residual[2] > 0.5
    assert stats.residual[:2].max() <= 1e-12
    torch.testing.assert_close(stats.trace[:, -1], stats.residual)
    assert 0 < stats.n_clipped < stats.n_vjp  # in one sample, after the first products


@pytest.mark.filterwarnings("ignore::deq_phantom_plugin.ConvergenceWarning")
def test_a_clipped_sample_is_a_failure_to_a_guard():
    problem = symmetric((0.3, 0.6, 1.7))
    inner = f"{IFT}, clip=2.0)"
    policy = "fallback('jfb')"
    got = problem.g(f"guard({inner!r}, on_failure={policy!r})")
    assert torch.equal(got[:2], problem.g(inner)[:2])
    torch.testing.assert_close(got[2], problem.v[2])
    with pytest.raises(dpp.ConvergenceError, match="adjoint solve left"):
        problem.g(f"guard({inner!r}, on_failure='raise')")


@pytest.mark.filterwarnings("ignore::deq_phantom_plugin.ConvergenceWarning")
def test_ift_a_wild_sample_does_not_change_the_others():
    calm, wild = symmetric((0.3, 0.9, 0.5)), symmetric((0.3, 0.9, 1e6))
    a, b = (problem.g("ift(solver='fixed_point', clip=1.0)") for problem in (calm, wild))
    assert torch.equal(a[:2], b[:2])
    assert b[2].norm() <= 2 * wild.v[2].norm() * (1 + 1e-12)


@pytest.mark.filterwarnings("ignore::deq_phantom_plugin.ConvergenceWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_clipped_sample_does_not_pass_for_the_rounding_of_the_others(dtype):
    """Rounding is how far a product is from linear, and a clipped one is far from that.

    The second sample takes many products, and stops where its own rounding is.
    """
    problem = symmetric((0.3, 0.97, 1.7))
    problem.jacobians, problem.v = problem.jacobians.to(dtype), problem.v.to(dtype)
    problem.inject = problem.inject.detach().to(dtype).requires_grad_()
    told = []
    context = dpp.Context(batch_dim=0, monitor=told.append)
    spec = "ift(solver='fixed_point', max_iter=400, clip=40.0)"
    problem.g(spec, context)
    clipped_at = told[0].n_clipped
    problem.jacobians[2] = problem.jacobians[0]
    problem.g(spec, context)
    assert clipped_at > 0
    assert told[1].n_clipped == 0
    assert told[0].residual[1] <= 1.5 * told[1].residual[1] + 1e-4


def test_a_clipped_sample_at_the_rounding_of_16_bits_is_said_too():
    """It has come as far as rounding allows, but in another equation."""
    problem = symmetric((0.3, 0.5, 1.7))
    problem.jacobians, problem.v = problem.jacobians.bfloat16(), problem.v.bfloat16()
    problem.inject = problem.inject.detach().bfloat16().requires_grad_()
    with pytest.warns(dpp.ConvergenceWarning, match=r"1 of 3 samples .* products were clipped"):
        problem.g("ift(solver='fixed_point', max_iter=400, clip=4.0)")


def test_zero_nan_and_products_that_are_not_finite_in_ift():
    problem = symmetric((0.3, 0.6, 0.5))
    spec = f"{IFT}, clip=4.0)"
    v = problem.v.clone()
    v[0], v[1, 2] = 0, torch.inf
    got = problem.g(spec, v=v)
    assert torch.equal(got[:2], v[:2])
    torch.testing.assert_close(got[2], problem.g(spec)[2], rtol=1e-10, atol=1e-12)
    problem.jacobians[2, 1, 3] = torch.inf
    with pytest.raises(dpp.NonFiniteError, match="NaN or infinite"):
        problem.g(spec)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("", "solver='gmres'"),
        ("solver='anderson', ", "solver='anderson'"),
        ("solver='fixed_point', warm_start=True, ", "warm_start=True"),
        ("solver='fixed_point', higher_order=True, ", "higher_order=True"),
    ],
)
def test_what_relies_on_linear_products_is_refused(arguments, named):
    with pytest.raises(ValueError, match=f"clip=1.0 with {named}.*expected .*, or clip=None"):
        dpp.get_strategy(f"ift({arguments}clip=1.0)")


# --- told, composed, off ----------------------------------------------------------------------


def test_the_monitor_is_told_how_many_products_were_clipped():
    problem, told = Linear(), []
    by_hand, g = 0, problem.v
    for _ in range(5):
        image = problem.product(g)
        by_hand += int((image.norm(dim=1) > 0.4 * problem.v.norm(dim=1)).sum())
        g = problem.v + clipped(image, problem.v, 0.4)
    context = dpp.Context(batch_dim=0, monitor=told.append)
    for spec in ("npg(k=6, lam=1.0, clip=0.4)", "npg(k=6, lam=1.0, clip=1e9)", "npg(k=6)"):
        problem.g(spec, context)
    assert [stats.n_clipped for stats in told] == [by_hand, 0, 0]
    assert 5 < by_hand < 15
    assert [stats.n_vjp for stats in told] == [5, 5, 5]


def test_the_device_is_asked_only_for_a_monitor():
    """To read a number (`_local_scalar_dense`) is to wait for a GPU."""
    problem, reads = Linear(), {}
    for monitor in (None, lambda stats: None):
        context = dpp.Context(batch_dim=0, monitor=monitor)
        attached = dpp.attach(
            problem.func, torch.zeros_like(problem.v), "npg(k=6, clip=1.0)", context
        )
        with Operators() as ran:
            torch.autograd.grad(attached, problem.inject, problem.v)
        reads[monitor is None] = sum("_local_scalar_dense" in name for name in ran.names)
    assert reads == {True: 0, False: 1}


def test_off_the_operators_are_those_of_the_series():
    """And a clip adds its own to each product."""
    problem, ran = Linear(), {}
    for spec in ("npg(k=6, lam=1.0)", "npg(k=6, lam=1.0, clip=1.0)"):
        attached = dpp.attach(problem.func, torch.zeros_like(problem.v), spec, INDEPENDENT)
        with Operators() as operators:
            torch.autograd.grad(attached, problem.inject, problem.v)
        ran[spec] = Counter(operators.names)
    start = torch.zeros_like(problem.v, requires_grad=True)
    image, v = problem.func(start), problem.v
    with Operators() as operators:
        g = v
        for _ in range(5):
            (product,) = torch.autograd.grad(image, start, g, retain_graph=True)
            g = torch.add(v, torch.lerp(g, product, 1.0))
        torch.autograd.grad(image, problem.inject, 1.0 * g)
    off, on = ran.values()
    assert off == Counter(operators.names)
    assert (on - off)["aten.linalg_vector_norm.default"] == 2 * (1 + 5)


def test_only_a_clip_asks_whether_samples_are_independent():
    assert dpp.NPG(clip=1.0).tells_samples_apart
    assert not dpp.NPG().tells_samples_apart


@pytest.mark.parametrize(
    "spec", ["npg(k=4, lam=1.0, clip=0.6)", "ift(solver='fixed_point', clip=9)"]
)
@pytest.mark.filterwarnings("ignore::deq_phantom_plugin.AssumptionWarning")
def test_coupled_samples_are_found_out_and_have_one_norm(spec):
    problem = Linear((0.5, 0.9, 0.2))
    mixing = torch.tensor([[0.8, 0.2, 0], [0, 0.8, 0.2], [0.2, 0, 0.8]], dtype=torch.float64)
    alone = problem.func
    assert torch.equal(problem.g(spec, dpp.Context()), problem.g(spec, INDEPENDENT))
    problem.func = lambda h: mixing @ (alone(h) - problem.inject) + problem.inject
    found = problem.g(spec, dpp.Context())
    assert torch.equal(found, problem.g(spec, COUPLED))
    assert not torch.equal(found, problem.g(spec, INDEPENDENT))


def test_a_guard_and_a_ramp_take_it():
    problem = Linear((0.5, 0.9, 0.7))
    assert torch.equal(problem.g("guard('npg(k=3, clip=0.5)')"), problem.g("npg(k=3, clip=0.5)"))
    ramp = dpp.get_strategy("ramp('npg(clip=2.0)', {'clip': (2.0, 1.0)}, until=4)")
    assert [ramp.resolve(dpp.Context(step=step)).clip for step in (0, 2, 9)] == [2.0, 1.5, 1.0]
    with pytest.raises(ValueError, match=r"clip=None of npg.* is no number, so it cannot grow"):
        dpp.get_strategy("ramp('npg', {'clip': (2.0, 1.0)})")
    with pytest.raises(ValueError, match=r"clip=0\.0; expected a finite number above 0"):
        dpp.get_strategy("ramp('npg(clip=2.0)', {'clip': (2.0, 0.0)})")


def test_what_is_off_is_not_named():
    assert repr(dpp.NPG()) == "npg(k=5, lam=0.5)"
    assert repr(dpp.NPG(clip=1)) == "npg(k=5, lam=0.5, clip=1.0)"
    assert dpp.get_strategy("npg(clip=None)") == dpp.NPG()
