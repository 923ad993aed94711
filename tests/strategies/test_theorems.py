"""Theorems 1 and 2 of the supplement, and the traps in its Algorithm 3, as tests."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor

import deq_phantom_plugin as dpp
from deq_phantom_plugin.diagnostics.measure import ascent
from deq_phantom_plugin.diagnostics.measure.ascent import ascent_condition, measured_inner_product
from deq_phantom_plugin.testing import make_equilibrium

seeds = st.integers(0, 2**31)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def relative(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


# --- Theorem 1 --------------------------------------------------------------------------------


@st.composite
def specs(draw: st.DrawFn) -> dpp.GradStrategy:
    k, lam = draw(st.integers(1, 30)), draw(st.just(1.0) | st.floats(0.2, 1.0))
    tol = 10.0 ** draw(st.integers(-5, -1))
    return draw(
        st.sampled_from(
            [dpp.UPG(k, lam), dpp.NPG(k, lam), dpp.JFB(), dpp.IFT(tol=tol), dpp.Exact()]
        )
    )


@st.composite
def problems(draw: st.DrawFn, dtype: torch.dtype = torch.float64):
    """Maps that are contractions or nearly, of one or several samples and leaves, and a v."""
    batch = draw(st.integers(1, 2))
    widths = draw(st.lists(st.integers(1, 3), min_size=1, max_size=2))
    equilibrium = make_equilibrium(
        [(batch, width) for width in widths],
        list,
        seed=draw(seeds),
        norm=draw(st.floats(0.05, 1.5)),
        dtype=dtype,
    )
    seed = draw(seeds)
    v = [normal(seed + i, batch, width, dtype=dtype) for i, width in enumerate(widths)]
    return equilibrium, v


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_where_theorem_1_holds_the_gradient_is_an_ascent_direction(dtype):
    verdicts = []

    @settings(max_examples=60)
    @given(problems(dtype), specs())
    def check(drawn, spec):
        equilibrium, v = drawn
        found = ascent_condition(equilibrium.func, equilibrium.state, equilibrium.params, spec, v)
        assert found.inner_product > 0 or not found.holds
        assert found.holds or not found.remark_holds
        event(f"{spec.name}: {'holds' if found.holds else 'does not hold'}")
        verdicts.append((found.holds, found.remark_holds))

    check()
    for verdict in zip(*verdicts, strict=True):
        # Neither side of the condition goes untested.
        assert 0.2 < sum(verdict) / len(verdicts) < 0.95


@given(seeds, st.integers(1, 4), st.integers(0, 4), st.floats(0.0, 3.0))
def test_theorem_1_against_the_worst_gradient_of_its_size(seed, d_h, more, size):
    """A = (dF/dtheta + E) (I - J^T)^-1 with the E and v that hurt the most; any J."""
    jacobian, u = normal(seed, d_h, d_h), normal(seed + 1, d_h + more, d_h)
    left, sigma, right = torch.linalg.svd(u, full_matrices=False)
    bound = float(sigma[-1] ** 2 / sigma[0])
    error = -size * bound * torch.outer(left[:, -1], right[-1])
    system = torch.eye(d_h, dtype=torch.float64) - jacobian.mT
    v = system @ right[-1]
    a = (u + error) @ torch.linalg.inv(system)
    theta = torch.zeros(d_h + more, dtype=torch.float64, requires_grad=True)
    h = torch.zeros(d_h, dtype=torch.float64)

    def func(state):
        return jacobian @ state + u.mT @ theta

    def prescribed(func, equilibrium, context):
        return equilibrium + a.mT @ theta

    found = ascent_condition(func, h, [theta], prescribed, v, dpp.Context(batch_dim=None))
    assert found.lhs == pytest.approx(size * bound, rel=1e-4, abs=1e-8)
    assert found.rhs == pytest.approx(bound)
    if abs(size - 1) > 1e-3 and bound > 1e-4:
        assert found.holds == (size < 1)
    assert found.inner_product > 0 or not found.holds
    # The proof has ||E|| < sigma_min to give away: that is where this one turns around.
    threshold = float(sigma[-1])
    if abs(size * bound / threshold - 1) > 1e-6:
        assert (found.inner_product > 0) == (size * bound < threshold)


@pytest.mark.parametrize("spec", [dpp.NPG(3, 0.7), dpp.UPG(2, 1.0), dpp.JFB(), dpp.Exact()])
def test_theorem_1_is_computed_from_the_matrices_it_names(spec):
    """Against dense derivatives from autograd's own routine, in closed form for each strategy."""
    w, x, v = 0.3 * normal(1, 3, 3), normal(2, 3), normal(3, 3)

    def layer(h, theta):
        return torch.tanh(w @ h + theta[:3] * theta[3:] + x)

    theta = normal(4, 6).requires_grad_()
    with torch.no_grad():
        h = torch.zeros(3, dtype=torch.float64)
        for _ in range(500):
            h = layer(h, theta)
    coupled = dpp.Context(batch_dim=None)
    found = ascent_condition(lambda h: layer(h, theta), h, [theta], spec, v, coupled)

    j, u = torch.autograd.functional.jacobian(layer, (h, theta.detach()))
    u, one = u.mT, torch.eye(3, dtype=torch.float64)
    k, lam = {"npg": (3, 0.7), "upg": (2, 1.0), "jfb": (1, 1.0), "exact": (0, 1.0)}[spec.name]
    damped = lam * j.mT + (1 - lam) * one
    d = lam * sum((torch.linalg.matrix_power(damped, t) for t in range(k)), torch.zeros(3, 3))
    if spec.name == "exact":
        d = torch.linalg.inv(one - j.mT)
    sigma = torch.linalg.svdvals(u)
    lhs = torch.linalg.matrix_norm(u @ d @ (one - j.mT) - u, 2)
    remark_lhs = torch.linalg.matrix_norm(d @ (one - j.mT) - one, 2)
    inner = (u @ d @ v) @ (u @ torch.linalg.solve(one - j.mT, v))
    assert found.lhs == pytest.approx(float(lhs), abs=1e-12)
    assert found.rhs == pytest.approx(float(sigma[-1] ** 2 / sigma[0]))
    assert found.remark_lhs == pytest.approx(float(remark_lhs), abs=1e-12)
    assert found.remark_rhs == pytest.approx(float((sigma[-1] / sigma[0]) ** 2))
    assert found.inner_product == pytest.approx(float(inner))
    assert found.holds == (found.lhs < found.rhs)
    assert found.remark_holds == (found.remark_lhs < found.remark_rhs)


@pytest.mark.filterwarnings("ignore:h is no equilibrium")
def test_with_fewer_parameters_than_state_the_condition_never_holds():
    equilibrium = make_equilibrium([(2, 3)], norm=0.2)
    theta = torch.ones(5, dtype=torch.float64, requires_grad=True)
    mix = normal(0, 5, 6)

    def func(h):
        return equilibrium.func(h) + (theta @ mix).view(2, 3)

    found = ascent_condition(func, equilibrium.state, [theta], "exact", equilibrium.state)
    assert found.rhs == found.remark_rhs == 0
    assert not found.holds
    assert not found.remark_holds
    assert found.inner_product > 0  # the condition is sufficient, not necessary


def test_rounding_does_not_make_it_hold():
    """Two equal columns: sigma_min is zero but for rounding, and so is the left-hand side."""
    theta = normal(0, 4).requires_grad_()

    def func(h):
        return (theta @ theta.detach()).expand(2) + 0 * h

    h = func(torch.zeros(2, dtype=torch.float64)).detach()
    found = ascent_condition(func, h, [theta], "exact", torch.ones_like(h))
    assert found.lhs < 1e-12
    assert found.rhs < 1e-12
    assert not found.holds
    assert not found.remark_holds


def test_where_it_fails_the_gradient_can_point_backwards():
    """One eigenvalue 1.4 of J: (1 - 1.4)^-1 < 0, and JFB, as every Neumann sum, is above zero."""
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    factors = torch.tensor([1.4, 0.1], dtype=torch.float64)
    h, v = torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, 0.1], dtype=torch.float64)

    def func(state):
        return factors * state + theta

    found = ascent_condition(func, h, [theta], "jfb", v)
    assert not found.holds
    assert found.inner_product == pytest.approx(1 / (1 - 1.4) + 0.01 / 0.9)
    assert ascent_condition(func, h, [theta], "exact", v).holds
    assert "Theorem 1 does not hold" in str(found)
    assert "-2.48889" in str(found)


def test_a_solver_that_is_not_linear_is_judged_by_the_gradient_that_was_measured():
    equilibrium = make_equilibrium([(1, 6)], norm=0.9)
    v = normal(1, 1, 6)
    args = (equilibrium.func, equilibrium.state, equilibrium.params)
    found = ascent_condition(*args, "ift(tol=0.3)", v)
    gradient = dpp.attach(equilibrium.func, equilibrium.state, "ift(tol=0.3)")
    phantom = torch.cat([g.flatten() for g in torch.autograd.grad(gradient, equilibrium.params, v)])
    gradient = dpp.attach(equilibrium.func, equilibrium.state, "exact")
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(gradient, equilibrium.params, v)])
    assert found.inner_product == pytest.approx(float(phantom @ exact))
    # A v is the measured gradient, so the error of A is at least the one seen at v.
    system = torch.eye(6, dtype=torch.float64) - equilibrium.jacobian().mT
    u = torch.linalg.solve(system, v[0])
    assert found.lhs >= torch.linalg.vector_norm(phantom - exact) / torch.linalg.vector_norm(u)


def test_the_remark_does_not_apply_to_unrolling_away_from_the_equilibrium():
    equilibrium = make_equilibrium([(1, 4)], norm=0.2)
    away = equilibrium.state + 0.05
    v = torch.ones_like(away)
    upg = ascent_condition(equilibrium.func, away, equilibrium.params, "upg(k=8, lam=1.0)", v)
    npg = ascent_condition(equilibrium.func, away, equilibrium.params, "npg(k=8, lam=1.0)", v)
    assert upg.remark_lhs < upg.remark_rhs
    assert not upg.remark_holds
    assert npg.remark_holds


def test_adaptive_and_checkpointed_strategies_schedules_and_bptt_are_measured_too():
    equilibrium = make_equilibrium([(2, 2), (2, 1)], list, norm=0.3)
    v = [torch.ones_like(leaf) for leaf in equilibrium.state]
    memory = dpp.Memory()
    memory.step = 10
    stats = []
    context = dpp.Context(memory=memory, monitor=stats.append)
    for spec in (
        "npg(k=30, lam='adaptive')",
        "upg(k=30, lam=1.0, checkpoint=True)",
        "bptt(steps=30)",
        "schedule({0: 'jfb', 5: 'ift(tol=1e-10)'})",
    ):
        found = ascent_condition(
            equilibrium.func, equilibrium.state, iter(equilibrium.params), spec, v, context
        )
        assert found.holds
        assert found.lhs < 1e-8
    assert stats == []
    assert memory.step == 10


def test_under_no_grad_and_with_a_gradient_of_another_dtype():
    equilibrium = make_equilibrium([(1, 3)], norm=0.3)
    args = (equilibrium.func, equilibrium.state, equilibrium.params, "npg(k=9)")
    with torch.no_grad():
        quiet = ascent_condition(*args, torch.ones(1, 3))
        assert measured_inner_product(*args, torch.ones(1, 3)).cosine > 0.9
    assert quiet == ascent_condition(*args, torch.ones(1, 3, dtype=torch.float64))


@given(problems(), specs())
def test_the_measured_inner_product_is_the_dense_one(drawn, spec):
    equilibrium, v = drawn
    args = (equilibrium.func, equilibrium.state, equilibrium.params, spec, v)
    found = measured_inner_product(*args)
    scale = abs(found.inner_product / found.cosine)
    assert found.inner_product == pytest.approx(
        ascent_condition(*args).inner_product, abs=1e-6 * scale
    )
    assert found.residual <= 1e-8
    assert -1 - 1e-12 <= found.cosine <= 1 + 1e-12


def test_measuring_has_no_size_limit_and_says_how_good_its_reference_is():
    equilibrium = make_equilibrium([(50, 100)], norm=0.9, dtype=torch.float32)
    args = (equilibrium.func, equilibrium.state, equilibrium.params)
    with pytest.raises(ValueError, match="a state of 5000 elements and parameters of 15000 need"):
        ascent_condition(*args, "npg", equilibrium.state)
    found = measured_inner_product(*args, "npg(k=60, lam=1.0)", equilibrium.state)
    assert found.cosine == pytest.approx(1, abs=1e-4)
    assert 0 < found.residual <= 10 * torch.finfo(torch.float32).eps
    assert f"residual of {found.residual:.1e}" in str(found)
    # A strategy without a gradient has no direction either.
    none = measured_inner_product(*args, lambda func, h, context: h, equilibrium.state)
    assert none.inner_product == none.cosine == 0


def test_the_size_limit_counts_bytes_and_backward_passes(monkeypatch):
    equilibrium = make_equilibrium([(1, 4)])
    args = (equilibrium.func, equilibrium.state, equilibrium.params, "jfb", equilibrium.state)
    needed = 6 * 8 * 4 * (20 + 4)
    monkeypatch.setattr(ascent, "_BYTE_LIMIT", needed)
    ascent_condition(*args)
    monkeypatch.setattr(ascent, "_BYTE_LIMIT", needed - 1)
    with pytest.raises(ValueError, match=r"GiB .* 9 backward passes.*measured_inner_product"):
        ascent_condition(*args)
    monkeypatch.setattr(ascent, "_BYTE_LIMIT", needed)
    monkeypatch.setattr(ascent, "_STATE_LIMIT", 3)
    with pytest.raises(ValueError, match=r"at most .* GiB and 3 elements of state"):
        ascent_condition(*args)


def weird(**changes):
    """Arguments of `ascent_condition` with some exchanged."""
    theta = torch.ones(3, dtype=torch.float64, requires_grad=True)
    arguments = {
        "func": lambda h: 0.5 * h + theta,
        "equilibrium": 2 * theta.detach(),
        "params": [theta],
        "grad": "jfb",
        "loss_grad": torch.ones(3, dtype=torch.float64),
    }
    return arguments | changes


stranger = torch.ones(2, requires_grad=True)


@pytest.mark.parametrize("function", [ascent_condition, measured_inner_product])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"params": []}, "params is empty"),
        ({"params": stranger}, "params is a Tensor; expected a sequence of tensors"),
        ({"params": None}, "params is a NoneType; expected a sequence"),
        ({"params": [3.0]}, r"params\[0\] is a float; expected a tensor"),
        ({"params": [torch.ones(3)]}, r"params\[0\], of shape .*does not require grad"),
        ({"params": [stranger]}, r"params\[0\] is not used by func"),
        ({"func": lambda h: h.detach()}, r"params\[0\] is not used by func"),
        ({"func": lambda h: h[:2]}, r"func's result has shape \(2,\)"),
        ({"loss_grad": [torch.ones(3)]}, "loss_grad has the structure"),
        ({"loss_grad": torch.ones(2)}, r"loss_grad has a leaf \(2,\); expected the shape \(3,\)"),
        ({"loss_grad": 1.0}, r"loss_grad has a leaf float; expected the shape \(3,\)"),
        ({"loss_grad": torch.zeros(3)}, "loss_grad has norm 0; expected finite numbers, not all"),
        ({"loss_grad": torch.full((3,), math.nan)}, "loss_grad has norm nan; expected finite"),
        ({"loss_grad": torch.full((3,), math.inf)}, "loss_grad has norm inf; expected finite"),
        ({"loss_grad": torch.ones(3, dtype=torch.complex64)}, "a complex tensor in"),
        ({"equilibrium": torch.ones(3, dtype=torch.complex64)}, "a complex tensor in"),
        ({"equilibrium": torch.full((3,), math.nan)}, "the equilibrium holds NaN or Inf"),
        ({"equilibrium": torch.ones(3, requires_grad=True)}, "carries an autograd graph"),
        ({"grad": "nothing"}, "nothing"),
    ],
)
def test_bad_arguments_are_named(function, changes, message):
    with pytest.raises(ValueError, match=message):
        function(**weird(**changes))


@pytest.mark.parametrize("tol", [0, -1.0, math.nan, "small"])
def test_a_bad_tolerance_is_named(tol):
    with pytest.raises(ValueError, match="tol="):
        measured_inner_product(**weird(), tol=tol)


def test_an_eigenvalue_of_one_has_no_exact_gradient():
    theta = torch.ones(2, dtype=torch.float64, requires_grad=True)
    turn = torch.tensor([[0.6, 0.4], [0.4, 0.6]], dtype=torch.float64)  # eigenvalues 1 and 0.2
    arguments = weird(
        func=lambda h: turn @ h + theta,
        equilibrium=torch.ones(2, dtype=torch.float64),
        params=[theta],
        loss_grad=torch.ones(2),
    )
    with pytest.raises(ValueError, match="I - J\\^T is singular"):
        ascent_condition(**arguments)


def test_derivatives_that_are_not_finite_are_told_apart():
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    h = torch.zeros(2, dtype=torch.float64)

    def exploding(func, equilibrium, context):
        return func(equilibrium) + (theta * math.inf - (theta * math.inf).detach())

    with pytest.raises(dpp.NonFiniteError, match="a derivative of func "):
        ascent_condition(lambda h: h.sqrt() + theta, h, [theta], "jfb", torch.ones(2))
    for function in (ascent_condition, measured_inner_product):
        with pytest.raises(dpp.NonFiniteError, match="a derivative of the strategy "):
            function(lambda h: 0.5 * h + theta, h, [theta], exploding, torch.ones(2))


def test_the_results_are_plain_and_frozen():
    found = ascent_condition(**weird())
    for field in dataclasses.fields(found):
        wanted = bool if field.name.endswith("holds") else float
        assert type(getattr(found, field.name)) is wanted
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.holds = True


# --- Theorem 2 --------------------------------------------------------------------------------


def with_eigenvalues(values: list[complex], skew: float) -> Tensor:
    """A real matrix with these eigenvalues (of a pair, the first), symmetric if they are real
    and skew is zero."""
    rows = [[[z.real, -z.imag], [z.imag, z.real]] for z in map(complex, values)]
    blocks = torch.tensor(rows, dtype=torch.float64)
    core = torch.block_diag(*(b if b[1, 0] else b[:1, :1] for b in blocks))
    basis = torch.linalg.qr(normal(0, *core.shape)).Q
    basis = basis @ (torch.eye(len(core)).double() + skew * normal(1, *core.shape).triu(1))
    return basis @ core @ torch.linalg.inv(basis)


MAPS = {
    "symmetric": ([0.9, 0.4, -0.3, 0.2, 0.1, -0.5], 0.0, lambda x: x),
    "symmetric, negative": ([-0.9, 0.4, -0.3, 0.2, 0.1, 0.5], 0.0, lambda x: x),
    "skew": ([0.9, 0.4, -0.3, 0.2, 0.1, -0.5], 0.5, lambda x: x),
    "complex pair": ([0.8 + 0.4j, 0.0, 0.3, -0.3, 0.2], 0.5, lambda x: x),
    "tanh": ([1.0, 0.4, -0.3, 0.2, 0.1, -0.5], 0.0, torch.tanh),
    "tanh, skew": ([1.0, 0.4, -0.3, 0.2, 0.1, -0.5], 0.5, torch.tanh),
}


@pytest.mark.parametrize("lam", [1.0, 0.7, 0.5, 0.3])
@pytest.mark.parametrize("name", MAPS)
def test_the_error_falls_as_the_spectral_radius_of_the_damped_map(name, lam):
    """Theorem 2: rho(B)^k, for B = lam J^T + (1 - lam) I."""
    values, skew, layer = MAPS[name]
    weight = with_eigenvalues(values, skew).requires_grad_()
    inject = (0.3 * normal(2, 4, len(weight))).requires_grad_()

    def func(h):
        return layer(h @ weight.mT + inject)

    h = torch.zeros_like(inject)
    with torch.no_grad():
        for _ in range(2000):
            h = func(h)
    v = h - normal(3, *h.shape)

    def gradient(spec):
        grads = torch.autograd.grad(dpp.attach(func, h, spec), [weight, inject], v)
        return torch.cat([grad.flatten() for grad in grads])

    jacobian = torch.autograd.functional.jacobian(lambda x: func(x.view_as(h)).ravel(), h.ravel())
    damped = lam * jacobian + (1 - lam) * torch.eye(len(jacobian), dtype=torch.float64)
    radius = float(torch.linalg.eigvals(damped).abs().max())
    exact = gradient("exact")
    for strategy in (dpp.UPG, dpp.NPG):
        ks = range(1, 61, 3)
        errors = [relative(gradient(strategy(k, lam)), exact) for k in ks]
        points = [(k, math.log(error)) for k, error in zip(ks, errors, strict=True)]
        points = [point for point in points if point[1] > math.log(1e-12)]  # above rounding
        assert len(points) >= 10
        k, log_error = torch.tensor(points, dtype=torch.float64).unbind(1)
        design = torch.stack([k, torch.ones_like(k)], dim=1)
        slope = float(torch.linalg.lstsq(design, log_error[:, None]).solution[0])
        # Ten per cent would not tell rho(B) from one.
        assert math.exp(slope) == pytest.approx(radius, rel=0.02)


@pytest.mark.filterwarnings("ignore:h is no equilibrium")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("lam", [1.0, 0.5])
def test_from_elsewhere_unrolling_finds_the_gradient_of_the_equilibrium_and_neumann_not(seed, lam):
    """Theorem 2 (ii): UPG's steps go to h*, and its gradient with them; NPG stays where it is."""
    equilibrium = make_equilibrium([(3, 6)], norm=0.9, seed=seed)
    elsewhere = equilibrium.state + 0.5 * normal(seed, 3, 6)
    exact = equilibrium.gradient("exact")
    there = equilibrium.gradient("exact", start=elsewhere)

    def error(strategy, k):
        return relative(equilibrium.gradient(strategy(k, lam), start=elsewhere), exact)

    ks = (1, 5, 20, 60, 200)
    unrolled = [error(dpp.UPG, k) for k in ks]
    assert all(later < earlier for earlier, later in itertools.pairwise(unrolled[:-1]))
    assert unrolled[0] > 0.3
    assert unrolled[-1] < 1e-13
    # Measured: 0.37, 0.58, 0.70 and 1.03 for the four maps.
    assert all(error(dpp.NPG, k) > 0.35 for k in ks)
    # What NPG tends to is the implicit gradient's formula at that point.
    assert error(dpp.NPG, 200) == pytest.approx(relative(there, exact), rel=1e-9)


@pytest.mark.parametrize("layer", [lambda x: x, torch.tanh], ids=["linear", "tanh"])
def test_npg_reaches_exact_at_lipschitz_constant_0_9(layer):
    """Section 4.1's model, h* = F(h* + u) with a symmetric weight: 0.9^200 = 7.1e-10."""
    weight = with_eigenvalues([0.9, *torch.linspace(-0.9, 0.88, 31).tolist()], 0.0)
    assert torch.linalg.matrix_norm(weight, 2) == pytest.approx(0.9)
    u, y = (0.1 * normal(1, 8, 32)).requires_grad_(), normal(2, 8, 32)

    def func(h):
        return layer((h + u) @ weight.mT)

    h = torch.zeros(8, 32, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(1000):
            h = func(h)

    def error(v):
        npg, exact = (
            torch.autograd.grad(dpp.attach(func, h, spec), u, v)[0]
            for spec in ("npg(k=200, lam=1.0)", "exact")
        )
        return relative(npg, exact)

    bound = 0.9**200 * (1 + 1e-6)
    assert error(2 * (h - y) / y.numel()) <= bound < 1e-8
    if layer is not torch.tanh:  # along the leading eigenvector the bound is met
        leading = torch.linalg.eigh(weight).eigenvectors[:, -1]
        assert error(leading.expand(8, 32)) == pytest.approx(bound, rel=1e-4)


# --- Algorithm 3 ------------------------------------------------------------------------------


def algorithm_3_as_printed(func, h, v, z, k: int, lam: float) -> Tensor:
    """Lines 2 to 7: f = (1 - lam) h + lam F, and then lam (df/dz) g_hat."""
    h = h.clone().requires_grad_()
    f = (1 - lam) * h + lam * func(h)
    g_hat = v
    for _ in range(k - 1):
        g_hat = v + torch.autograd.grad(f, h, g_hat, retain_graph=True)[0]
    return lam * torch.autograd.grad(f, z, g_hat)[0]


@pytest.mark.parametrize("lam", [1.0, 0.5, 0.2])
def test_lambda_is_counted_once(lam):
    """df/dz holds a lam already, so that the printed line 7 tends to lam times the gradient."""
    equilibrium = make_equilibrium([(2, 5)], norm=0.8)
    v = normal(1, 2, 5)
    func, h, z = equilibrium.func, equilibrium.state, equilibrium.params[0]

    def gradient(spec):
        return torch.autograd.grad(dpp.attach(func, h, spec), z, v)[0]

    exact = gradient("exact")
    for k in (1, 4, 400):
        printed = algorithm_3_as_printed(func, h, v, z, k, lam)
        for strategy in (dpp.NPG(k, lam), dpp.UPG(k, lam)):
            assert relative(printed, lam * gradient(strategy)) < 1e-12
    assert relative(printed, lam * exact) < 1e-10
    assert relative(gradient(dpp.NPG(400, lam)), exact) < 1e-10
    assert relative(gradient(dpp.UPG(400, lam)), exact) < 1e-10
