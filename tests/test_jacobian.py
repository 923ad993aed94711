"""Jacobian regularisation and spectral radius, against dense Jacobians."""

from __future__ import annotations

import copy
import re
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import deq_phantom_plugin as dpp
from conftest import equilibria
from deq_phantom_plugin.testing import make_equilibrium


def linear(matrix: torch.Tensor):
    return lambda h: h @ matrix.mT


def radius_of(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.eigvals(matrix).abs().max()


# --- spectral radius --------------------------------------------------------------------------


@given(equilibria(), st.none() | st.floats(0.05, 1.0))
def test_spectral_radius_is_that_of_the_dense_jacobian(drawn, lam):
    equilibrium, context = drawn
    got = dpp.spectral_radius(
        equilibrium.func, equilibrium.state, lam, batch_dim=context.batch_dim, tol=1e-8
    )
    jacobian = equilibrium.jacobian()
    if lam is not None:
        jacobian = lam * jacobian + (1 - lam) * torch.eye(len(jacobian), dtype=torch.float64)
    torch.testing.assert_close(got.max(), radius_of(jacobian), rtol=1e-5, atol=1e-12)
    if context.batch_dim is None:
        assert got.shape == ()
    else:
        assert got.shape == (equilibrium.leaves[0].shape[0],)


@pytest.mark.parametrize(
    "eigenvalues",
    [
        [0.9 + 0.3j, 0.9 - 0.3j, 0.5, -0.2],
        [1.4j, -1.4j, 1.2, 0.1],
        [-1.3, 1.3, 0.9, 0.2],
        [-1.5, 1.4, 1.3, 0.2],
        [0.7, 0.7, 0.7, 0.7],
        [0.0, 0.0, 0.0, 0.0],
    ],
)
@pytest.mark.parametrize("skew", [0.0, 3.0])
def test_complex_opposite_and_repeated_leading_eigenvalues(eigenvalues, skew):
    """Rayleigh quotients, as TorchDEQ's power_method returns, fail on these."""
    blocks = []
    values = [complex(value) for value in eigenvalues]
    while values:
        z = values.pop(0)
        if z.imag:
            values.remove(z.conjugate())
            blocks.append(torch.tensor([[z.real, -z.imag], [z.imag, z.real]]))
        else:
            blocks.append(torch.tensor([[z.real]]))
    matrix = torch.block_diag(*blocks).double()
    basis = torch.eye(4, dtype=torch.float64) + skew * torch.rand(4, 4, dtype=torch.float64).triu(1)
    matrix = basis @ matrix @ torch.linalg.inv(basis)
    got = dpp.spectral_radius(linear(matrix), torch.zeros(3, 4, dtype=torch.float64))
    want = max(abs(complex(value)) for value in eigenvalues)
    torch.testing.assert_close(
        got, torch.full((3,), want, dtype=torch.float64), rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_non_symmetric_maps(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(200, 200, generator=generator, dtype=dtype) / 200**0.5
    got = dpp.spectral_radius(linear(matrix), torch.zeros(2, 200, dtype=dtype), max_iter=2000)
    want = radius_of(matrix.double()).to(dtype).expand(2)
    torch.testing.assert_close(got, want, rtol=2e-3, atol=0)


def test_symmetric_maps_keep_the_stated_tolerance():
    matrix = torch.randn(100, 100, dtype=torch.float64)
    matrix = matrix + matrix.mT
    for tol in (1e-2, 1e-4, 1e-8):
        got = dpp.spectral_radius(
            linear(matrix), torch.zeros(1, 100, dtype=torch.float64), tol=tol, max_iter=5000
        )
        assert abs(float(got / radius_of(matrix)) - 1) <= tol


def test_each_sample_has_its_own_radius():
    scales = torch.tensor([0.1, 2.0, -0.7], dtype=torch.float64)
    got = dpp.spectral_radius(lambda h: scales[:, None] * h, torch.zeros(3, 4, dtype=torch.float64))
    torch.testing.assert_close(got, scales.abs())


def test_power_method_of_torchdeq_is_wrong_here():
    """Why there is one of our own."""
    from torchdeq.loss import power_method

    matrix = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    start = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    _, theirs = power_method(linear(matrix)(start), start)
    assert theirs.abs().max() < 0.1
    torch.testing.assert_close(
        dpp.spectral_radius(linear(matrix), start.detach()), torch.ones(1, dtype=torch.float64)
    )


def test_spectral_radius_leaves_no_trace():
    problem = make_equilibrium([(2, 3)])
    state = torch.random.get_rng_state()
    radius = dpp.spectral_radius(problem.func, problem.state)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not radius.requires_grad
    assert all(param.grad is None for param in problem.params)
    with torch.no_grad():
        assert torch.equal(dpp.spectral_radius(problem.func, problem.state), radius)


def test_stopping_short_warns():
    matrix = torch.randn(300, 300, dtype=torch.float64)
    with pytest.warns(dpp.ConvergenceWarning, match="after 5 vector-Jacobian products"):
        dpp.spectral_radius(linear(matrix), torch.zeros(1, 300, dtype=torch.float64), max_iter=5)


def test_non_finite_products_raise():
    weight = torch.tensor(float("inf"))
    with pytest.raises(dpp.NonFiniteError, match="leading eigenvalue"):
        dpp.spectral_radius(lambda h: h * weight, torch.ones(1, 2))


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"lam": 0}, "lam=0"),
        ({"lam": 1.1}, "lam=1.1"),
        ({"tol": 0}, "tol=0"),
        ({"max_iter": 0}, "max_iter=0"),
    ],
)
def test_spectral_radius_arguments(kwargs, match):
    with pytest.raises(ValueError, match=match):
        dpp.spectral_radius(lambda h: h, torch.ones(1, 2), **kwargs)


# --- regularisation ---------------------------------------------------------------------------


@pytest.mark.parametrize("n_samples", [1, 3])
def test_jacobian_reg_is_torchdeqs(n_samples):
    from torchdeq.loss import jac_reg

    problem = make_equilibrium([(4, 3)], dtype=torch.float32)
    torch.manual_seed(1)
    ours = dpp.jacobian_reg(problem.func, problem.state, n_samples=n_samples)
    torch.manual_seed(1)
    start = problem.state.clone().requires_grad_()
    theirs = jac_reg(problem.func(start), start, vecs=n_samples)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(ours, problem.params),
        torch.autograd.grad(theirs, problem.params),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@given(equilibria())
def test_jacobian_reg_estimates_the_frobenius_norm(drawn):
    equilibrium, _ = drawn
    torch.manual_seed(0)
    jacobian = equilibrium.jacobian()
    got = dpp.jacobian_reg(equilibrium.func, equilibrium.state, n_samples=400)
    want = jacobian.square().sum() / len(jacobian)
    # The variance of ||J^T e||^2 is 2 ||J J^T||_F^2.
    deviation = (2 * (jacobian @ jacobian.mT).square().sum() / 400).sqrt() / len(jacobian)
    assert abs(got - want) < 5 * deviation


def test_jacobian_reg_is_differentiable():
    problem = make_equilibrium([(2, 3)], norm=0.7)
    weight, inject = problem.params

    def reg(weight, inject):
        torch.manual_seed(3)
        return dpp.jacobian_reg(lambda h: torch.tanh(h @ weight.mT + inject), problem.state, 2)

    assert torch.autograd.gradcheck(reg, (weight, inject))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("size", [0.9, 1e-4])
def test_squares_of_16_bits_are_added_in_32(dtype, size):
    """In float16 their sum would be infinite above 65504, and small ones would be zero."""
    a = torch.tensor(size, dtype=dtype, requires_grad=True)
    state = (torch.zeros(64, 1024, dtype=dtype), torch.zeros(70, 1000, dtype=dtype))
    torch.manual_seed(0)
    found = dpp.jacobian_reg(lambda h: (a * h[0], a * h[1]), state)
    torch.manual_seed(0)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    probes = torch.cat([torch.randn_like(leaf).flatten().to(wide) for leaf in state])
    expected = (a.detach().to(wide) * probes).abs().square().mean()  # J is a times the identity
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=0)
    if size > 0.1:  # below, gradients in 16 bits need a scaled loss
        (slope,) = torch.autograd.grad(found, a)
        torch.testing.assert_close(
            slope.real.double(), 2 * expected / a.detach().real.double(), rtol=1e-2, atol=0
        )


def test_jacobian_reg_costs_one_evaluation_and_one_product_a_probe():
    problem = make_equilibrium([(2, 3)])
    evaluations, products = [], []

    def func(h):
        evaluations.append(1)
        out = problem.func(h)
        out.register_hook(lambda grad: products.append(1))
        return out

    dpp.jacobian_reg(func, problem.state, n_samples=3)
    assert (len(evaluations), len(products)) == (1, 3)


def test_jacobian_reg_without_grad_is_a_number():
    problem = make_equilibrium([(2, 3)])
    with torch.no_grad():
        assert not dpp.jacobian_reg(problem.func, problem.state).requires_grad
    assert dpp.jacobian_reg(lambda h: torch.ones_like(h), problem.state) == 0


@pytest.mark.parametrize("n_samples", [0, 1.5, True, "2"])
def test_jacobian_reg_arguments(n_samples):
    with pytest.raises(ValueError, match="n_samples"):
        dpp.jacobian_reg(lambda h: h, torch.ones(1, 2), n_samples=n_samples)


def test_radii_of_several_factors_at_once_are_those_of_each_alone():
    # Leading eigenvalues -0.95 and 0.9: the eigenvector of the first is blind to the second.
    eigenvalues = torch.tensor([-0.95, 0.9, 0.3, -0.2, 0.1], dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    weight = basis @ torch.diag(eigenvalues) @ basis.mT
    h = torch.zeros(2, 5, dtype=torch.float64)
    lams = [1.0, 0.7, 0.3]
    found = dpp.spectral_radius(lambda h: h @ weight, h, lams)
    expected = torch.stack([(lam * eigenvalues + 1 - lam).abs().max() for lam in lams])
    torch.testing.assert_close(found, expected[:, None].expand(3, 2), rtol=2e-3, atol=0)


@pytest.mark.parametrize("lam", ["0.5", True, [0.5, 2], [None, "a"], []])
def test_damping_factors_of_a_radius_are_checked(lam):
    with pytest.raises(ValueError, match="lam="):
        dpp.spectral_radius(lambda h: h, torch.zeros(1, 2), lam)


# --- F with a checkpoint, which runs its modules again for each product ---------------------------


def checkpointed():
    """A network that updates buffers and draws; F without and with a checkpoint; a state."""
    torch.manual_seed(0)
    parts = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.2)
    net = nn.Sequential(*parts).double()
    with torch.no_grad():
        net[0].weight.mul_(0.3)
    h = torch.randn(6, 4, dtype=torch.float64)
    kept = lambda h: 0.5 * checkpoint(net, h, use_reentrant=False)  # noqa: E731
    return net, lambda h: 0.5 * net(h), kept, h


@pytest.mark.parametrize("batch_dim", ["auto", None])
@pytest.mark.filterwarnings("ignore:the samples of the batch depend")
def test_the_products_of_a_radius_leave_no_trace_in_buffers(batch_dim):
    net, plain, kept, h = checkpointed()
    net[3].p = 0.0
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    found = dpp.spectral_radius(kept, h, batch_dim=batch_dim, tol=1e-8)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(torch.get_rng_state(), state)
    dense = torch.autograd.functional.jacobian(plain, h).reshape(24, 24)
    torch.testing.assert_close(found, radius_of(dense))


def test_the_products_of_jacobian_reg_change_buffers_and_random_state_as_one_evaluation_does():
    found = []
    for which in ("plain", "kept"):
        net, plain, kept, h = checkpointed()
        torch.manual_seed(1)
        reg = dpp.jacobian_reg(plain if which == "plain" else kept, h, n_samples=3)
        buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
        drawn = torch.rand(4)
        found.append((reg.detach(), *torch.autograd.grad(reg, net[0].weight), drawn))
        net, plain, _, h = checkpointed()
        torch.manual_seed(1)
        plain(h)
        for name, buffer in net.named_buffers():
            assert torch.equal(buffer, buffers[name]), (which, name)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


# --- kernels without a second derivative ---------------------------------------------------------


def attention(h):
    return F.scaled_dot_product_attention(h, h, h)


def eager_attention(h):
    return torch.softmax(h @ h.mT * h.shape[-1] ** -0.5, dim=-1) @ h


def fused_attention(h):
    """What a model of its own does that chooses a kernel."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return attention(h)


class _Kernel(torch.autograd.Function):
    """x^3, by a kernel whose backward is another kernel."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            return gradient * 3 * x**2


class _Once(_Kernel):
    backward = staticmethod(once_differentiable(_Kernel.backward))


class _Twice(_Kernel):
    """One whose backward is made of ordinary operations."""

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * 3 * x**2


class _Attribute(_Kernel):
    """One that keeps its input, and a mask of floats, as attributes."""

    @staticmethod
    def forward(ctx, x):
        ctx.x, ctx.mask = x, (x > -0.1).to(x)
        return x**3 * ctx.mask

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 3 * ctx.x**2 * ctx.mask


class _WithSlope(_Kernel):
    """One that saves its slope, and returns it too, so that it has a derivative."""

    @staticmethod
    def forward(ctx, x):
        slope = 3 * x**2
        ctx.save_for_backward(x, slope)
        return x**3, slope

    @staticmethod
    def backward(ctx, gradient, of_slope):
        x, slope = ctx.saved_tensors
        return gradient * slope + of_slope * 6 * x


class _KeptSlope(_Kernel):
    """One whose slope is a number to autograd, and no function of x."""

    @staticmethod
    def forward(ctx, x):
        ctx.slope = 3 * x**2
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.slope


class _SavedSlope(_Kernel):
    """The same; to save an intermediate result does not help."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(3 * x**2)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0]


def second(method, part):
    """A gradient through a second derivative of an equilibrium with a `part` in its map."""
    torch.manual_seed(0)
    weight = (0.3 * torch.randn(8, 8, dtype=torch.float64)).requires_grad_()
    x = torch.randn(2, 2, 4, 8, dtype=torch.float64)
    func = lambda h: torch.tanh(0.3 * part(h @ weight) + x)  # noqa: E731
    h = torch.zeros_like(x)
    with torch.no_grad():
        for _ in range(80):
            h = func(h)
    if method == "jacobian_reg":
        loss = dpp.jacobian_reg(func, h)
    else:
        state = dpp.attach(func, h, f"{method[:-1]}, tol=1e-12)", dpp.Context(batch_dim=0))
        (gradient,) = torch.autograd.grad(state.square().sum(), weight, create_graph=True)
        loss = gradient.square().sum()
    return torch.autograd.grad(loss, weight)[0]


METHODS = ["jacobian_reg", "ift(higher_order=True)"]


@pytest.mark.parametrize("method", METHODS)
def test_fused_attention_has_the_second_derivative_of_eager_attention(method):
    fused = torch.backends.cuda.flash_sdp_enabled()
    torch.testing.assert_close(second(method, attention), second(method, eager_attention))
    assert torch.backends.cuda.flash_sdp_enabled() == fused  # for the layers around
    torch.testing.assert_close(second(method, _Twice.apply), second(method, lambda h: h**3))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("part", "what"),
    [
        (fused_attention, "a kernel that has no second derivative"),
        (_Once.apply, "marked once_differentiable"),
        (_Kernel.apply, "_Kernel, a custom function whose backward is not differentiable"),
    ],
)
def test_what_has_no_second_derivative_is_refused_in_backward(method, part, what):
    with pytest.raises(RuntimeError, match=f"{re.escape(method)}.*{what}.*'eager'.*MATH kernel"):
        second(method, part)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("part", "plain"),
    [
        (_Attribute.apply, lambda x: x**3 * (x > -0.1)),
        (lambda x: _WithSlope.apply(x)[0], lambda x: x**3),
    ],
)
def test_what_a_custom_function_keeps_rightly_is_no_obstacle(method, part, plain):
    torch.testing.assert_close(second(method, part), second(method, plain))


@pytest.mark.parametrize("part", [_KeptSlope.apply, _SavedSlope.apply])
def test_a_slope_that_a_custom_function_keeps_is_a_constant_as_in_pytorch(part):
    """What no error tells. It is told by gradgradcheck, as the documentation says."""
    h = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(_Twice.apply, (h,))
    assert not torch.autograd.gradgradcheck(part, (h,), raise_exception=False)
    a = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    (found,) = torch.autograd.grad(dpp.jacobian_reg(lambda h: part(a * h), h.detach()), a)
    torch.manual_seed(0)
    (product,) = torch.autograd.grad(part(a * h), h, torch.randn_like(h), create_graph=True)
    (by_hand,) = torch.autograd.grad(product.square().mean(), a)
    torch.testing.assert_close(found, by_hand)


def test_the_regulariser_of_what_has_no_second_derivative_is_a_number():
    """For a log: nothing is refused before somebody asks for a gradient."""
    h = torch.randn(2, 3, dtype=torch.float64)
    for part in (_Kernel.apply, _Once.apply):
        torch.manual_seed(0)
        found = dpp.jacobian_reg(part, h)
        torch.manual_seed(0)
        torch.testing.assert_close(found.detach(), dpp.jacobian_reg(lambda h: h**3, h))
        with pytest.raises(RuntimeError, match="jacobian_reg"):
            found.backward()


def test_threads_leave_the_choice_of_the_kernel_as_it_was():
    weight = torch.randn(8, 8, requires_grad=True)
    inside = threading.Barrier(2, timeout=60)

    def func(h):
        inside.wait()  # both have chosen
        return attention(h @ weight)

    def regularise():
        dpp.jacobian_reg(func, torch.zeros(1, 1, 4, 8))

    threads = [threading.Thread(target=regularise) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()
