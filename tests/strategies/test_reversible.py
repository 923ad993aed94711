"""Reversible: the gradient of the coupled iteration, its memory, precision and manners."""

from __future__ import annotations

import gc
import math
import warnings
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

import deq_phantom_plugin as dpp
from conftest import equilibria, evaluate
from deq_phantom_plugin._plumbing.sketch import Sketch
from deq_phantom_plugin.strategies.drift import Drift
from deq_phantom_plugin.testing import NESTINGS, make_equilibrium


def coupled(func, start, steps, beta):
    """The iteration as the paper writes it, through autograd."""
    y = z = start
    for _ in range(steps):
        y = tree_map(lambda old, f: (1 - beta) * old + beta * f, y, func(z))
        z = tree_map(lambda old, f: (1 - beta) * old + beta * f, z, func(y))
    return z


def zeros(problem):
    return tree_map(torch.zeros_like, problem.state)


def nested():
    return make_equilibrium([(2, 3), (2, 2), (2, 2, 1)], NESTINGS[-1][2])


def assert_close(got, want, rtol):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.linalg.vector_norm(a - b) <= rtol * torch.linalg.vector_norm(b)


class Encoded(nn.Module):
    """A map whose injection comes from an encoder: no leaf of the graph."""

    def __init__(self, dtype=torch.float64) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4))
        self.layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.to(dtype)
        with torch.no_grad():
            self.layer.parametrizations.weight.original0.mul_(0.5)

    def forward(self, x, solve):
        inject = self.encoder(x)
        return solve(lambda h: torch.tanh(self.layer(h) + inject), torch.zeros_like(inject))


def solved_by(spec):
    return lambda func, start: dpp.attach(func, start, grad=spec)


# --- value and gradient -----------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.3, 0.5, 0.8, 1.2, 1.7])
@pytest.mark.parametrize("steps", [1, 2, 6])
def test_gradient_is_backprop_through_the_iteration(steps, beta):
    problem = nested()
    got = dpp.attach(problem.func, zeros(problem), dpp.Reversible(steps, beta))
    want = coupled(problem.func, zeros(problem), steps, beta)
    for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert_close(
        torch.autograd.grad(problem.probe(got), problem.params),
        torch.autograd.grad(problem.probe(want), problem.params),
        1e-10,
    )


@given(drawn=equilibria(), steps=st.integers(1, 8), beta=st.floats(0.1, 0.8) | st.floats(1.2, 1.9))
def test_gradient_on_any_contraction(drawn, steps, beta):
    problem, context = drawn
    got = problem.gradient(dpp.Reversible(steps, beta), context, start=zeros(problem))
    attached = coupled(problem.func, zeros(problem), steps, beta)
    want = torch.autograd.grad(problem.linear_loss(attached), problem.params)
    assert_close([got], [torch.cat([g.flatten() for g in want])], 1e-8)


@pytest.mark.parametrize("how", ["backward", "grad"])
def test_an_injection_from_an_encoder(how):
    model, x = Encoded(), torch.randn(3, 5, dtype=torch.float64)

    def gradients(solve):
        loss = model(x, solve).square().sum()
        if how == "grad":
            return torch.autograd.grad(loss, list(model.parameters()))
        model.zero_grad()
        loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    got = gradients(solved_by("reversible(steps=5)"))
    assert_close(got, gradients(lambda func, start: coupled(func, start, 5, 0.8)), 1e-9)


def test_many_steps_give_the_exact_gradient():
    problem = make_equilibrium([(2, 3)], norm=0.5)
    got = problem.gradient("reversible(steps=25, beta=0.5)", start=zeros(problem))
    # 0.5 + 0.5 * 0.5 bounds what is left after each update.
    assert_close([got], [problem.gradient("exact")], 0.75**25)


def test_an_initial_state_with_a_graph():
    problem = make_equilibrium([(2, 3)])
    initial = torch.full((2, 3), 0.1, dtype=torch.float64, requires_grad=True)
    context = dpp.Context(initial_state=initial * 2)
    got = dpp.attach(problem.func, problem.state, "reversible(steps=3)", context)
    want = coupled(problem.func, initial * 2, 3, 0.8)
    torch.testing.assert_close(got, want)
    assert_close(
        torch.autograd.grad(problem.probe(got), [initial, *problem.params]),
        torch.autograd.grad(problem.probe(want), [initial, *problem.params]),
        1e-10,
    )


def test_second_derivatives():
    weight = (0.3 * torch.randn(3, 3, dtype=torch.float64)).requires_grad_()
    inject = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def loss(weight, inject):
        func = lambda h: torch.tanh(h @ weight + inject)  # noqa: E731
        start = torch.zeros(2, 3, dtype=torch.float64)
        return dpp.attach(func, start, "reversible(steps=4, beta=0.5)").square().sum()

    assert torch.autograd.gradcheck(loss, (weight, inject))
    assert torch.autograd.gradgradcheck(loss, (weight, inject))


def test_states_along_the_way():
    problem = make_equilibrium([(2, 3)])
    strategy, context = dpp.Reversible(steps=4), dpp.Context()
    states = list(strategy.states(problem.func, zeros(problem), context))
    want = [coupled(problem.func, zeros(problem), n, 0.8) for n in range(1, 5)]
    torch.testing.assert_close(states, want, rtol=1e-12, atol=1e-14)
    assert_close(
        torch.autograd.grad(sum(map(problem.probe, states)), problem.params),
        torch.autograd.grad(sum(map(problem.probe, want)), problem.params),
        1e-10,
    )


def test_a_backward_pass_between_the_states():
    problem = make_equilibrium([(2, 3)])
    states = dpp.Reversible(steps=3).states(problem.func, zeros(problem), dpp.Context())
    for n, state in enumerate(states, start=1):
        assert_close(
            torch.autograd.grad(problem.probe(state), problem.params, retain_graph=True),
            torch.autograd.grad(
                problem.probe(coupled(problem.func, zeros(problem), n, 0.8)), problem.params
            ),
            1e-10,
        )


# --- what F may be ----------------------------------------------------------------------------


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad * weight, grad * x


@pytest.mark.parametrize("kind", ["function", "script", "checkpoint", "in place", "energy"])
def test_f_of_any_kind(kind):
    """Captured tensors are found by autograd itself, wherever they enter."""
    layer = nn.Linear(3, 3).double()
    weight = torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)
    inject = weight * torch.arange(3.0).double()
    scripted = torch.jit.script(layer) if kind == "script" else layer

    def func(h):
        if kind == "function":
            return torch.tanh(Scale.apply(h, inject) + layer(h))
        if kind == "checkpoint":
            return checkpoint(lambda x: torch.tanh(layer(x) + inject), h, use_reentrant=False)
        if kind == "in place":
            out = torch.zeros_like(h)
            out[:, 1:] = layer(h)[:, 1:]
            return out.add_(inject).tanh_()
        if kind == "energy":  # the gradient of a scalar, taken inside F
            with torch.enable_grad():
                x = h if h.requires_grad else h.detach().requires_grad_()
                energy = (torch.tanh(x @ layer.weight) * inject).sum()
                return torch.autograd.grad(energy, x, create_graph=True)[0] * 0.3
        return torch.tanh(scripted(h) + inject)

    start = torch.full((2, 3), 0.1, dtype=torch.float64)
    params = [weight, layer.weight]
    got = dpp.attach(func, start, "reversible(steps=3)").square().sum()
    want = coupled(func, start, 3, 0.8).square().sum()
    got = torch.autograd.grad(got, params, retain_graph=True)  # of the injection
    assert_close(got, torch.autograd.grad(want, params), 1e-10)


def test_hooks_of_captured_tensors_run_once():
    problem = make_equilibrium([(2, 3)])
    plain = problem.gradient("reversible(steps=3)", start=zeros(problem))
    inject = problem.params[1]
    handle = inject.register_hook(lambda grad: 2 * grad)
    hooked = problem.gradient("reversible(steps=3)", start=zeros(problem))
    handle.remove()
    weight = problem.params[0].numel()
    torch.testing.assert_close(hooked[:weight], plain[:weight], rtol=0, atol=0)
    torch.testing.assert_close(hooked[weight:], 2 * plain[weight:], rtol=0, atol=0)


def test_f_that_captures_nothing():
    out = dpp.attach(lambda h: torch.tanh(h + 1), torch.zeros(2, 3), grad="reversible")
    assert not out.requires_grad
    initial = torch.zeros(2, 3, requires_grad=True)
    context = dpp.Context(initial_state=initial)
    func = lambda h: torch.tanh(0.5 * h + 1)  # noqa: E731
    dpp.attach(func, torch.zeros(2, 3), "reversible(steps=2)", context).sum().backward()
    assert initial.grad.abs().min() > 0


def test_complex_states():
    matrix = 0.4 * torch.tensor([[1 + 1j, 0.5], [-0.3j, 0.7]], dtype=torch.complex128)
    inject = torch.tensor([[1 + 2j, -1j]], dtype=torch.complex128, requires_grad=True)
    func = lambda h: torch.tanh(h @ matrix.mT + inject)  # noqa: E731
    start = torch.zeros(1, 2, dtype=torch.complex128)
    weight = torch.tensor([[0.3 - 1j, 2.0]], dtype=torch.complex128)
    got = (dpp.attach(func, start, "reversible(steps=4)") * weight).real.sum()
    want = (coupled(func, start, 4, 0.8) * weight).real.sum()
    assert_close(torch.autograd.grad(got, inject), torch.autograd.grad(want, inject), 1e-9)


# --- memory -----------------------------------------------------------------------------------


def tensors() -> list[torch.Tensor]:
    gc.collect()
    return [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]


def held_bytes(steps: int) -> int:
    """Bytes that are held between forward and backward, each storage counted once."""
    problem = make_equilibrium([(64, 50)])
    start = zeros(problem)
    before = {id(x) for x in tensors()}
    packed = []  # tensors held by nodes have no Python object of their own

    def pack(tensor):
        packed.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        attached = dpp.attach(problem.func, start, dpp.Reversible(steps))
    held = [x for x in tensors() if id(x) not in before]
    assert any(x is attached for x in held)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held}
    return sum(storages.values())


def test_bytes_held_do_not_grow_with_steps():
    state = 64 * 50 * 8
    few, many = held_bytes(6), held_bytes(60)
    # The start, three pairs of states, and the result. Of each evaluation eight numbers.
    assert many - few <= 2 * (60 - 6) * 8 * 8
    assert 8 * state <= few <= 8.5 * state


def test_one_graph_at_a_time():
    """Counts the tensors alive that F saves in its middle."""
    problem = make_equilibrium([(2, 3)])

    def peak(steps):
        alive, counts = [], []

        def func(h):
            middle = torch.sin(h * 1.0)
            alive.append(weakref.ref(middle))
            counts.append(sum(ref() is not None for ref in alive))
            return problem.func(middle)

        attached = dpp.attach(func, zeros(problem), dpp.Reversible(steps, 0.5))
        assert [ref() for ref in alive if ref() is not None] == []
        attached.sum().backward()
        assert len(counts) == 4 * steps
        return max(counts)

    assert peak(3) == peak(20) <= 2


# --- precision --------------------------------------------------------------------------------


def lipschitz_map(activation, lipschitz, size, dtype, seed=0):
    """A map whose Lipschitz constant is known, its injection, and its weight."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    weight = (lipschitz * torch.linalg.qr(draw(size, size))[0]).to(dtype).requires_grad_()
    inject = draw(3, size).to(dtype)
    return lambda h: activation(h @ weight.mT + inject), inject, weight


def states_seen(func, start, steps, beta):
    """What F is given, evaluation by evaluation: forwards, and recovered in backward."""
    seen = []

    def watched(h):
        seen.append(h.detach().double())
        return func(h)

    dpp.attach(watched, start, dpp.Reversible(steps, beta)).sum().backward()
    assert len(seen) == 4 * steps
    return seen[: 2 * steps], seen[2 * steps :][::-1]


def bounds(steps, beta, lipschitz, eta, phi):
    """The bound of the docstring on the error of what F is given, for max ||w|| = 1."""
    a, c = 1 / abs(1 - beta), lipschitz * beta / abs(1 - beta)
    r = (c + math.sqrt(c * c + 4 * a)) / 2
    rho = a * (8 * torch.finfo(torch.float64).eps / 2 + 2 * beta * (lipschitz * eta + phi))
    kept = [1, round(2 * steps / 3), round(4 * steps / 3), 2 * steps]
    since = [min(k - n for k in kept if k >= n) for n in range(1, 2 * steps + 1)]
    return [rho * (r**k - 1) / (r - 1) for k in since]


@pytest.mark.numerics
@given(
    steps=st.integers(1, 40),
    beta=st.floats(0.05, 0.95) | st.floats(1.05, 1.95),
    lipschitz=st.floats(0, 2),
    size=st.integers(1, 40),
    activation=st.sampled_from([torch.tanh, torch.relu, lambda x: x * 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_rounding_is_within_the_bound(steps, beta, lipschitz, size, activation, dtype, seed):
    func, inject, _ = lipschitz_map(activation, lipschitz, size, dtype, seed)
    unit = torch.finfo(dtype).eps / 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dpp.ConvergenceWarning)
        try:
            there, back = states_seen(func, torch.zeros(3, size, dtype=dtype), steps, beta)
        except dpp.NonFiniteError:
            return
    norm = torch.linalg.vector_norm
    largest = max(*(float(norm(w)) for w in there), float(norm(inject)))
    # A sum of products rounds `size` times at most (Higham 2002, section 3.1).
    phi = (size + 4) * unit * (math.sqrt(size) * lipschitz + 1)
    eta = 0 if dtype == torch.float64 else unit
    for a, b, bound in zip(there, back, bounds(steps, beta, lipschitz, eta, phi), strict=True):
        if bound < 1:  # beyond, errors are not small against the states
            # And what F is given is rounded once more.
            assert norm(a - b) <= (bound + 2 * eta) * largest


@pytest.mark.numerics
@pytest.mark.parametrize(("beta", "lipschitz"), [(0.5, 1.0), (0.8, 0.5), (0.8, 1.0), (0.9, 0.0)])
def test_the_bound_is_attained(beta, lipschitz):
    """By F(h) = -L h + u, as far as rounding errors point one way."""
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    inject = torch.linspace(1, 2, 50, dtype=torch.float64)
    func = lambda h: weight * (inject - lipschitz * h)  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dpp.ConvergenceWarning)
        there, back = states_seen(func, torch.zeros_like(inject), 12, beta)
    norm = torch.linalg.vector_norm
    largest = max(float(norm(w)) for w in there)
    off = [float(norm(a - b)) / largest for a, b in zip(there, back, strict=True)]
    bound = bounds(12, beta, lipschitz, 0, torch.finfo(torch.float64).eps)
    deepest = max(range(24), key=bound.__getitem__)
    assert bound[deepest] / 1000 <= off[deepest] <= bound[deepest]


def test_the_table_follows_from_the_bound():
    rows = [line.split() for line in dpp.Reversible.__doc__.splitlines()]
    betas, radii, steps = (
        next([float(x) for x in row[-7:]] for row in rows if row[:1] == [word] and len(row) > 7)
        for word in ("beta", "r", "steps")
    )
    for beta, radius, count in zip(betas, radii, steps, strict=True):
        a, c = 1 / abs(1 - beta), beta / abs(1 - beta)
        r = (c + math.sqrt(c * c + 4 * a)) / 2
        assert radius == pytest.approx(r, abs=0.06)
        # Backward starts anew after a third of 2 * steps evaluations.
        assert r ** (2 * count / 3) <= 1e11 < r ** (2 * (count + 1) / 3)


def gradients(func, start, params, steps, beta):
    """Those of `reversible` and of backprop through the same iteration, and the warnings."""

    def reference():
        y = z = start.double()
        for _ in range(steps):
            y = torch.add(beta * func(z.to(start.dtype)).double(), y, alpha=1 - beta)
            z = torch.add(beta * func(y.to(start.dtype)).double(), z, alpha=1 - beta)
        return z.to(start.dtype)

    v = torch.randn(start.shape, dtype=start.dtype, generator=torch.Generator().manual_seed(1))
    want = torch.autograd.grad(reference(), params, v)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        attached = dpp.attach(func, start, dpp.Reversible(steps, beta))
        got = torch.autograd.grad(attached, params, v)
    return got, want, record


def relative_error(got, want):
    got, want = (torch.cat([g.double().flatten() for g in grads]) for grads in (got, want))
    return float(torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want))


class Normalised(nn.Module):
    """Kinks and normalisation, which amplify whatever is small against 1e-5: an MDEQ in small."""

    def __init__(self, dtype):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.one, self.two, self.three = (nn.GroupNorm(4, 8) for _ in range(3))
        self.inject = nn.Parameter(torch.randn(2, 8, 6, 6))
        self.to(dtype)

    def forward(self, h):
        out = self.two(torch.relu(self.one(self.conv(h)))) + self.inject
        return self.three(torch.relu(h + out))


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_a_start_at_zero_where_f_amplifies(dtype, steps):
    """What is recovered in place of an exact zero is no zero: the start is given to F itself."""
    model = Normalised(dtype)
    start = torch.zeros(2, 8, 6, 6, dtype=dtype)
    got, want, record = gradients(model, start, list(model.parameters()), steps, 0.8)
    assert record == []
    assert relative_error(got, want) < (1e-2 if dtype == torch.float32 else 1e-8)


def test_zeros_are_recovered_as_zeros():
    """A ReLU that F begins with has another derivative beside zero."""
    weight = (0.3 * torch.randn(40, 40, dtype=torch.float64)).requires_grad_()
    bias = torch.randn(5, 40, dtype=torch.float64, requires_grad=True)
    func = lambda h: torch.relu(torch.relu(h) @ weight.mT + bias)  # noqa: E731
    start = torch.zeros(5, 40, dtype=torch.float64)
    got, want, _ = gradients(func, start, [weight, bias], 6, 0.8)
    assert relative_error(got, want) < 1e-12


MAPS = {
    "relu": lambda dtype, L: (lipschitz_map(torch.relu, L, 40, dtype), (3, 40)),
    "tanh": lambda dtype, L: (lipschitz_map(torch.tanh, L, 40, dtype), (3, 40)),
}


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*sorted(MAPS), "normalised"])
@pytest.mark.parametrize("beta", [0.5, 0.8, 0.9, 1.5])
def test_large_errors_warn_and_small_ones_do_not(name, beta, dtype):
    """Whichever the errors are on this machine."""
    found = []
    for lipschitz in (0.9,) if name == "normalised" else (0.9, 2.5):
        for steps in (3, 10, 25) if name == "normalised" else (3, 10, 25, 60):
            if name == "normalised":
                model = Normalised(dtype)
                func, params, shape = model, list(model.parameters()), (2, 8, 6, 6)
            else:
                (func, _, weight), shape = MAPS[name](dtype, lipschitz)
                params = [weight]
            start = torch.zeros(shape, dtype=dtype)
            try:
                got, want, record = gradients(func, start, params, steps, beta)
            except dpp.NonFiniteError:
                continue
            error = relative_error(got, want)
            found.append(error)
            if error > 5e-2:
                assert len(record) == 1
            if lipschitz < 1 and steps <= 10 and name != "normalised":
                assert error < 1e-4
                assert record == []
    assert min(found) < 1e-6


def test_too_many_steps_warn_once():
    func, _, _ = lipschitz_map(torch.relu, 2.5, 20, torch.float64)
    with pytest.warns(dpp.ConvergenceWarning) as record:
        for _ in range(3):
            start = torch.zeros(3, 20, dtype=torch.float64)
            dpp.attach(func, start, "reversible(steps=60, beta=0.9)").sum().backward()
    assert len(record) == 1
    message = str(record[0].message)
    assert "reversible(steps=60, beta=0.9)" in message
    assert "fewer steps" in message


@pytest.mark.numerics
@pytest.mark.parametrize(("steps", "beta"), [(30, 0.9), (60, 0.8), (60, 1.5)])
def test_the_estimated_error_of_the_gradient_is_about_right(steps, beta, monkeypatch):
    found, loss = [], Drift.loss
    monkeypatch.setattr(Drift, "loss", lambda drift: found.append(loss(drift)) or found[-1])
    func, _, weight = lipschitz_map(torch.relu, 2.5, 40, torch.float64)
    start = torch.zeros(3, 40, dtype=torch.float64)
    got, want, _ = gradients(func, start, [weight], steps, beta)
    error = relative_error(got, want)
    # Of an error that is larger than the gradient only that is to be known.
    assert min(error, 1) / 10 <= found[-1].error
    assert found[-1].error <= 1e3 * max(error, math.sqrt(error))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5, 11), (64, 50), (0, 3)])
def test_sketches_tell_how_far_states_are_apart(shape, dtype):
    a, b = (torch.randn(shape, dtype=dtype) for _ in range(2))
    sketch = Sketch([a, b])
    assert sketch([a, b]).shape == (2, 8)
    torch.testing.assert_close(sketch([a, b]) - sketch([b, b]), sketch([a - b, 0 * b]))
    norms = torch.linalg.vector_norm(sketch([a, b]), dim=1) / math.sqrt(8)
    for norm, leaf in zip(norms, (a, b), strict=True):
        exact = torch.linalg.vector_norm(leaf)
        assert exact / 3 <= norm <= 3 * exact


def test_sketches_draw_nothing():
    before = torch.get_rng_state()
    Sketch([torch.zeros(30)])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("steps", [2, 20])
def test_a_backward_pass_waits_for_the_device_once(steps, monkeypatch):
    problem, waited = nested(), []
    attached = dpp.attach(problem.func, zeros(problem), dpp.Reversible(steps))
    loss = problem.probe(attached)
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__"):
        own = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda x, own=own, name=name: waited.append(name) or own(x)
        )
    loss.backward(inputs=problem.params)
    assert waited == ["tolist"]


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_a_random_f_is_noticed(steps):
    layer = nn.Linear(20, 20)
    func = lambda h: torch.tanh(nn.functional.dropout(layer(h), 0.3) + 1)  # noqa: E731
    attached = dpp.attach(func, torch.zeros(8, 20), dpp.Reversible(steps))
    with pytest.warns(dpp.AssumptionWarning, match="not deterministic"):
        attached.sum().backward()


def test_modules_that_draw_are_named():
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.2), nn.Tanh())
    attached = dpp.attach(model, torch.ones(4, 6), "reversible(steps=4)")
    with pytest.warns(dpp.AssumptionWarning, match="draw or update: Dropout"):
        attached.sum().backward()
    model.eval()
    dpp.attach(model, torch.ones(4, 6), "reversible(steps=4)").sum().backward()


# --- buffers ----------------------------------------------------------------------------------


class Counted(nn.Module):
    """Its value depends on a buffer that each evaluation replaces, and on one it changes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.2 * torch.randn(6, 6))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", None)
        self.register_buffer("constant", torch.ones(6))

    def forward(self, h):
        self.calls += 1
        mean = h.detach().mean(0)
        self.mean = mean if self.mean is None else 0.5 * (self.mean + mean)
        out = h @ self.weight * (1 + 0.1 * self.calls.clone()) + 0.1 * self.mean
        return torch.tanh(out + self.constant)


BUFFERED = {
    "batch norm": lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh()),
    "spectral norm": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)), nn.Tanh()
    ),
    "spectral norm by hooks": lambda: nn.Sequential(
        nn.utils.spectral_norm(nn.Linear(6, 6)), nn.Tanh()
    ),
    "counted": Counted,
}


def buffers(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("name", BUFFERED)
@pytest.mark.parametrize("passes", [1, 2])
def test_buffers_that_f_updates(name, passes):
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(BUFFERED[name]().double())
    start = torch.randn(16, 6, dtype=torch.float64)
    got = dpp.attach(models[0], start, "reversible(steps=6)")
    after = buffers(models[0])
    want = coupled(models[1], start, 6, 0.8)
    torch.testing.assert_close(after, buffers(models[1]), rtol=1e-12, atol=1e-14)
    grads = [
        torch.autograd.grad(out.square().sum(), list(model.parameters()), retain_graph=True)
        for out, model in [*[(got, models[0])] * passes, (want, models[1])]
    ]
    for found in grads[:-1]:
        assert relative_error(found, grads[-1]) < 1e-11
    torch.testing.assert_close(buffers(models[0]), after, rtol=0, atol=0)


def test_what_buffers_hold_later_is_left_alone():
    """Between forward and backward another batch may have gone through."""
    torch.manual_seed(0)
    model = BUFFERED["spectral norm"]().double()
    start = torch.randn(4, 6, dtype=torch.float64)
    attached = dpp.attach(model, start, "reversible(steps=3)")
    model(start)
    later = buffers(model)
    attached.sum().backward()
    torch.testing.assert_close(buffers(model), later, rtol=0, atol=0)


def test_numbers_that_are_not_finite_raise():
    weight = torch.tensor(0.1, requires_grad=True)  # float16 overflows on the way back
    func = lambda h: (1e3 * (h - weight).square()).sin() * weight  # noqa: E731
    attached = dpp.attach(func, torch.ones(4, dtype=torch.float16), "reversible(99, 0.99)")
    with pytest.raises(dpp.NonFiniteError, match="fewer steps"):
        attached.sum().backward()


# --- surroundings -----------------------------------------------------------------------------


def test_autocast_in_backward_as_in_forward():
    model, x, dtypes = Encoded(torch.float32), torch.randn(3, 5), []
    model.layer.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))

    def gradients(solve):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(x, solve)
        return torch.autograd.grad(out.float().sum(), list(model.parameters()))

    got = gradients(solved_by("reversible(steps=3)"))
    assert set(dtypes) == {torch.bfloat16}
    assert len(dtypes) == 12
    want = gradients(lambda func, start: coupled(func, start.float(), 3, 0.8))
    assert_close(got, want, 0.05)  # bfloat16 rounds the iterates to 4e-3

    # And none in backward where there was none.
    dtypes.clear()
    out = model(x, solved_by("reversible(steps=3)"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out.sum().backward()
    assert set(dtypes) == {torch.float32}


def test_a_head_may_work_in_place():
    problem = make_equilibrium([(2, 3)])
    start = zeros(problem)
    apart = problem.probe(dpp.attach(problem.func, start, grad="reversible").relu())
    within = problem.probe(dpp.attach(problem.func, start, grad="reversible").relu_())
    start.add_(1)  # nor is the start read again
    within = torch.autograd.grad(within, problem.params)
    assert_close(within, torch.autograd.grad(apart, problem.params), 0)


def test_parameters_changed_before_backward_are_noticed():
    problem = make_equilibrium([(2, 3)])
    loss = problem.probe(dpp.attach(problem.func, zeros(problem), grad="reversible"))
    with torch.no_grad():
        problem.params[0].mul_(1.001)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


def test_tensors_that_f_itself_changes_in_place_are_noticed():
    weight = torch.ones(2, requires_grad=True)
    func = lambda h: (0.1 * h * weight).exp().add_(1)  # noqa: E731
    loss = dpp.attach(func, torch.zeros(2), grad="reversible").sum()
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


def test_an_f_that_changes_between_evaluations_is_noticed():
    problem, calls = make_equilibrium([(2, 3)]), []

    def func(h):
        calls.append(1)
        return problem.func(h) if len(calls) <= 4 else 0.5 * h

    loss = dpp.attach(func, zeros(problem), grad="reversible(steps=2)").sum()
    with pytest.raises(RuntimeError, match="fewer tensors"):
        loss.backward()


# --- TorchDEQ ---------------------------------------------------------------------------------


@pytest.mark.parametrize("core", ["sliced", "indexing"])
@pytest.mark.parametrize("several", [False, True])
def test_through_torchdeq(core, several):
    torchdeq = pytest.importorskip("torchdeq")
    dpp.enable()
    shapes = [(3, 4), (3, 2, 3)] if several else [(3, 4)]
    problem = make_equilibrium(shapes, list if several else lambda leaves: leaves[0])
    evaluations = []

    def func(*state):
        evaluations.append(1)
        return problem.func(list(state) if several else state[0])

    deq = torchdeq.get_deq(core=core, grad="reversible(steps=20, beta=0.8)", f_max_iter=99)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (out,), _ = deq(func, zeros(problem))
        assert len(evaluations) == 40
        got = torch.autograd.grad(problem.probe(out), problem.params)
    want = coupled(problem.func, zeros(problem), 20, 0.8)
    assert_close(got, torch.autograd.grad(problem.probe(want), problem.params), 1e-4)

    (out,), _ = evaluate(deq, func, zeros(problem))
    for a, b in zip(tree_leaves(out), problem.leaves, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)

    sampled = torchdeq.get_deq(core=core, grad="reversible(steps=6)", sup_gap=2)
    outs, _ = sampled(func, zeros(problem))
    assert len(outs) == 3
    torch.testing.assert_close(
        tree_leaves(outs[1]), tree_leaves(coupled(problem.func, zeros(problem), 4, 0.8))
    )


# --- declarative ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("reversible(steps=0)", "steps=0; expected a whole number of at least 1"),
        ("reversible(steps=1.5)", "steps=1.5"),
        ("reversible(beta=1)", r"beta=1; expected .* cannot be undone: use bptt"),
        ("reversible(beta=1.0)", "beta=1.0"),
        ("reversible(beta=0)", r"beta=0; expected a number in \(0, 1\) or \(1, 2\)"),
        ("reversible(beta=2)", "beta=2"),
        ("reversible(beta=-0.5)", "beta=-0.5"),
        ("reversible(beta='half')", "beta='half'"),
        ("reversible(beta=True)", "beta=True"),
    ],
)
def test_arguments_out_of_range(spec, match):
    with pytest.raises(ValueError, match=match):
        dpp.get_strategy(spec)


def test_beta_nan_is_refused():
    with pytest.raises(ValueError, match="beta=nan"):
        dpp.Reversible(beta=float("nan"))
