"""`guard` with a fallback that is evaluated in backward: F is what it was, or that is said."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import deq_phantom_plugin as dpp
from deq_phantom_plugin.draws import SameDraws

# Nothing is solved in one product, so that every sample falls back.
FALLBACKS = ["npg(k=20, lam=0.7)", "upg(k=3)", "ift(tol=1e-10)", "upg(k=3, checkpoint=True)"]
FAILING = ["ift(max_iter=1)", "ift(max_iter=1, higher_order=True)"]

pytestmark = pytest.mark.filterwarnings("ignore::deq_phantom_plugin.ConvergenceWarning")


def falling_back(fallback, grad=FAILING[0]):
    return f"guard({grad!r}, on_failure={f'fallback({fallback!r})'!r}, adjoint_tol=1e-8)"


def turned(scale):
    """A matrix of radius `scale`, with a complex pair."""
    return scale * torch.tensor([[0.0, 1.3], [-1.3, 0.0]], dtype=torch.float64)


X = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    def __init__(self, spec, scale=0.5):
        super().__init__()
        self.layer = nn.Linear(2, 2, bias=False).double()
        self.eq = dpp.Equilibrium("fixed_point", spec, tol=1e-12, max_iter=400, batch_dim=0)
        with torch.no_grad():
            self.layer.weight.copy_(turned(scale))

    def forward(self, x):
        return self.eq(lambda h: torch.tanh(self.layer(h) + x), torch.zeros_like(x))


class Bare(Net):
    """A module whose parameter F reads itself, so that no module runs in F."""

    def forward(self, x):
        weight = self.layer.weight
        return self.eq(lambda h: torch.tanh(h @ weight.mT + x), torch.zeros_like(x))


class Read(Net):
    """As `Bare`, but F reads the parameter when it runs."""

    def forward(self, x):
        func = lambda h: torch.tanh(h @ self.layer.weight.mT + x)  # noqa: E731
        return self.eq(func, torch.zeros_like(x))


def gradient(net):
    return torch.autograd.grad(net(X).square().sum(), net.layer.weight)[0]


def at_other_parameters(net, weight=None):
    """The gradient at a weight that is given, where the module's own is -0.2 / 0.5 times it."""
    weight = turned(0.5).requires_grad_() if weight is None else weight
    with torch.no_grad():
        net.layer.weight.copy_(turned(-0.2))
    out = functional_call(net, {"layer.weight": weight}, (X,))
    return torch.autograd.grad(out.square().sum(), weight)[0]


# --- other parameters ----------------------------------------------------------------------------


@pytest.mark.parametrize("grad", FAILING)
@pytest.mark.parametrize("fallback", FALLBACKS)
@pytest.mark.parametrize("is_leaf", [True, False])
def test_under_functional_call_it_is_refused(grad, fallback, is_leaf):
    weight = turned(0.5).requires_grad_()
    weight = weight if is_leaf else weight * 1.0
    with pytest.raises(RuntimeError, match="functional_call take a strategy that evaluates"):
        at_other_parameters(Net(falling_back(fallback, grad)), weight)


def test_under_functional_call_auto_is_refused():
    net = Net(falling_back("npg(k=20, lam=0.7)", "auto"))
    dpp.set_step(net, 0)
    with torch.no_grad():
        net.layer.weight.copy_(torch.eye(2))

    class Mixes(torch.autograd.Function):
        """Its products are NaN, so that the solve fails."""

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * torch.tensor([[torch.inf], [1], [1]], dtype=grad.dtype)

    net.forward = lambda x: net.eq(
        lambda h: torch.tanh(net.layer(Mixes.apply(h)) + x), torch.zeros_like(x)
    )
    with pytest.raises(RuntimeError, match="func uses other parameters in backward"):
        at_other_parameters(net)


@pytest.mark.parametrize("spec", [falling_back("jfb"), "guard('ift', \"fallback('npg')\")"])
@pytest.mark.parametrize("make", [Net, Read])
def test_under_functional_call_what_needs_nothing_from_backward_is_right(make, spec):
    """jfb needs no Jacobian; and where nothing fails, nothing is evaluated again."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", dpp.AssumptionWarning)
        got, want = at_other_parameters(make(spec)), gradient(make(spec))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    if "jfb" in spec:
        assert not torch.allclose(got, gradient(make("ift(tol=1e-10)")), rtol=1e-2)


@pytest.mark.parametrize("grad", FAILING[:1])
@pytest.mark.parametrize("fallback", FALLBACKS)
def test_a_parameter_that_no_module_in_f_holds_is_compared_by_value(grad, fallback):
    spec = falling_back(fallback, grad)
    with pytest.warns(dpp.AssumptionWarning, match="guard.*evaluated again in backward"):
        at_other_parameters(Read(spec))
    torch.testing.assert_close(at_other_parameters(Bare(spec)), gradient(Bare(spec)))


def by_hand(fallback, h, code):
    """dL/dcode with a fallback's g, from the dense Jacobian of tanh(code W h + x)."""
    image = torch.tanh(h @ (code * turned(1.0)).mT + X)
    v = 2 * image.detach()
    slope = 1 - image.detach() ** 2
    jacobian = slope[:, :, None] * (code.detach() * turned(1.0))  # (samples, 2, 2)
    eye = torch.eye(2, dtype=torch.float64)
    if fallback.startswith("ift"):
        g = torch.linalg.solve((eye - jacobian).mT, v[:, :, None])
    else:
        steps, lam = (20, 0.7) if fallback.startswith("npg") else (3, 0.5)
        step = (lam * jacobian + (1 - lam) * eye).mT
        g = sum(torch.linalg.matrix_power(step, t) for t in range(steps)) @ v[:, :, None] * lam
    return torch.autograd.grad(image, code, g.squeeze(2))[0]


@pytest.mark.parametrize("fallback", FALLBACKS)
def test_weights_that_f_makes_itself_are_no_others(fallback):
    """A hypernetwork hands new tensors to the same module in every evaluation."""
    layer = nn.Linear(2, 2, bias=False).double()
    code = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def gradient(spec, h):
        def func(h):
            return torch.tanh(functional_call(layer, {"weight": code * turned(1.0)}, (h,)) + X)

        attached = dpp.attach(func, h, spec, dpp.Context(batch_dim=0))
        return torch.autograd.grad(attached.square().sum(), code)[0]

    h = torch.zeros_like(X)
    with torch.no_grad():
        for _ in range(400):
            h = torch.tanh(h @ (code * turned(1.0)).mT + X)
    with warnings.catch_warnings():
        warnings.simplefilter("error", dpp.AssumptionWarning)
        got = gradient(falling_back(fallback), h)
    # By a dense Jacobian: (dF/dW)^T g of the fallback's g, at the v of F(h*).
    want = by_hand(fallback, h, code)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


# --- other values --------------------------------------------------------------------------------


@pytest.mark.parametrize("fallback", [*FALLBACKS, "jfb"])
@pytest.mark.parametrize(
    ("grad", "broken"), [(FAILING[0], False), (FAILING[0], True), (FAILING[1], False)]
)
@pytest.mark.parametrize("late", [False, True])
def test_a_variable_with_another_value_in_backward_is_said(fallback, grad, late, broken):
    """`broken`: one sample is NaN, which must not hide what the others tell."""
    weight = turned(0.5).requires_grad_()
    nan = torch.tensor([[torch.nan if broken else 1.0], [1.0], [1.0]], dtype=torch.float64)

    def gradient(late):
        x = X

        def func(h):
            return torch.tanh(h @ weight.mT + x) * nan

        h = torch.zeros_like(X)
        with torch.no_grad():
            for _ in range(400):
                h = torch.tanh(h @ weight.mT + X)
        attached = dpp.attach(func, h, falling_back(fallback, grad), dpp.Context(batch_dim=0))
        loss = attached[1:].square().sum()
        x = 5 * attached.detach() if late else x
        return torch.autograd.grad(loss, weight)[0][1:]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = gradient(late)
        right = gradient(False)
    said = [w for w in caught if "given another value since" in str(w.message)]
    assert len(said) == (late and (fallback != "jfb" or "higher" in grad))
    if not broken and "higher" not in grad:
        assert torch.allclose(found, right, rtol=1e-6) == (not said)


def test_every_backward_pass_is_compared():
    weight, scale = turned(0.5).requires_grad_(), [1.0]
    h = torch.zeros_like(X)
    attached = dpp.attach(
        lambda h: torch.tanh(h @ weight.mT * scale[0] + scale[0]),
        h,
        "guard('ift(max_iter=1)', \"fallback('npg')\", forward_tol=9, adjoint_tol=1e-9)",
        dpp.Context(batch_dim=0),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", dpp.AssumptionWarning)
        attached.sum().backward(retain_graph=True)
    scale[0] = 2.0
    with pytest.warns(dpp.AssumptionWarning, match="evaluated again in backward"):
        attached.sum().backward()


# --- what is left behind -------------------------------------------------------------------------


@pytest.mark.parametrize("fallback", [*FALLBACKS, "jfb", "auto", "npg_rr"])
@pytest.mark.parametrize("batch_dim", ["auto", None])
@pytest.mark.filterwarnings("ignore:the samples of the batch depend on one another")
def test_backward_leaves_statistics_and_random_state_as_they_were(fallback, batch_dim):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.2))
    x, h = torch.randn(8, 4), torch.zeros(8, 4)
    with torch.no_grad():
        module[0].weight.mul_(0.2)
    func = SameDraws(lambda h: 0.5 * module(h) + x)
    with torch.no_grad():
        for _ in range(60):
            h = func(h)
    context = dpp.Context(batch_dim=batch_dim, memory=dpp.Memory(), step=0)
    count = module[1].num_batches_tracked
    before = int(count)
    attached = dpp.attach(func, h, falling_back(fallback), context)
    assert int(count) - before == 2
    buffers, state = copy.deepcopy(dict(module.named_buffers())), torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error", dpp.AssumptionWarning)
        attached.square().sum().backward()
    assert context.memory.failures["adjoint"] > 0
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    # npg_rr draws the length of its series, which must be another one in the next step.
    assert torch.equal(state, torch.get_rng_state()) == (fallback != "npg_rr")


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def forward(self, h):
        return 0.5 * torch.tanh(0.3 * checkpoint(self.inner, h, use_reentrant=False))


@pytest.mark.parametrize("fallback", FALLBACKS)
def test_so_does_a_checkpoint_inside_f(fallback):
    """Products with the Jacobian evaluate the checkpointed part again and again."""
    module = Checkpointed()
    count, h = module.inner[1].num_batches_tracked, torch.zeros(8, 4)
    x = torch.randn(8, 4)
    func = lambda h: module(h) + x  # noqa: E731
    with torch.no_grad():
        for _ in range(30):
            h = func(h)

    def updates(spec):
        attached = dpp.attach(func, h, spec, dpp.Context(batch_dim=None))
        before = int(count)
        attached.square().sum().backward()
        return int(count) - before

    alone = updates(FAILING[0])
    assert updates(falling_back(fallback)) == alone
