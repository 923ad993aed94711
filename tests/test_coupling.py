"""Samples that depend on one another: found out, said, and solved as one system."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import deq_phantom_plugin as dpp
from deq_phantom_plugin.adjoint import Linearization, Packing, mixes_samples
from deq_phantom_plugin.contract.errors import AssumptionWarning
from deq_phantom_plugin.inspection import inspect_map

SOLVERS = ("gmres", "fixed_point", "anderson", "broyden", "bicgstab")
IMPLICIT = [
    *(f"ift(solver={solver!r}, tol=1e-9, max_iter=400)" for solver in SOLVERS),
    "ift(tol=1e-9, higher_order=True)",
    "ift(tol=1e-9, warm_start=True)",
    "guard('ift(tol=1e-9)', on_failure='raise', adjoint_tol=1e-6)",
    "schedule({0: 'ift(tol=1e-9)'})",
    "exact",
]
PATTERNS = ("pair", "blocks", "chain", "all")


class Coupled:
    """tanh(M h + u) on (B, D), in which samples see one another as a pattern says."""

    def __init__(self, pattern, batch, size, seed, norm=0.7):
        generator = torch.Generator().manual_seed(seed)
        total = batch * size

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        seen = torch.eye(batch, dtype=torch.bool)
        if pattern == "pair" and batch > 1:
            i, j = torch.randperm(batch, generator=generator)[:2]
            seen[i, j] = True
        elif pattern == "blocks":
            group = torch.randint(max(batch // 2, 1), (batch,), generator=generator)
            seen |= group[:, None] == group
        elif pattern == "chain":
            seen |= torch.ones(batch, batch).triu(1).tril(1).bool()
        elif pattern == "all":
            seen[:] = True
        mask = seen.repeat_interleave(size, 0).repeat_interleave(size, 1)
        weight = randn(total, total) * mask
        self.weight = weight * (norm / torch.linalg.matrix_norm(weight, 2))
        self.weight.requires_grad_()
        self.inject = randn(batch, size).requires_grad_()
        # Unequal rows: scaling each by itself is another system.
        self.v = (
            randn(batch, size) * 10.0 ** torch.linspace(-2, 2, batch, dtype=torch.float64)[:, None]
        )
        self.state = torch.zeros(batch, size, dtype=torch.float64)
        with torch.no_grad():
            for _ in range(400):
                self.state = self(self.state)
        self.is_coupled = bool((seen.sum() > batch).item())

    def __call__(self, h):
        return torch.tanh((self.weight @ h.flatten()).view(h.shape) + self.inject)

    def jacobian(self):
        return torch.autograd.functional.jacobian(self, self.state).reshape(self.v.numel(), -1)

    def g(self, spec, context=None):
        """The g behind a strategy's gradient: that of what is added to F."""
        extra = torch.zeros_like(self.state, requires_grad=True)
        attached = dpp.attach(lambda h: self(h) + extra, self.state, spec, context)
        (g,) = torch.autograd.grad((attached * self.v).sum(), extra)
        return g.flatten()

    def exact(self):
        eye = torch.eye(self.v.numel(), dtype=torch.float64)
        return torch.linalg.solve(eye - self.jacobian().T, self.v.flatten())


def quiet(function, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AssumptionWarning)
        return function(*args)


@given(
    st.sampled_from(PATTERNS),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(0, 2**31),
    st.sampled_from(IMPLICIT),
)
def test_any_coupling_is_solved_as_it_is(pattern, batch, size, seed, spec):
    problem = Coupled(pattern, batch, size, seed)
    want = problem.exact()
    context = dpp.Context(memory=dpp.Memory())
    got = quiet(problem.g, spec, context)
    assert (got - want).norm() <= 1e-6 * want.norm()


@given(st.sampled_from(PATTERNS), st.integers(2, 6), st.integers(1, 3), st.integers(0, 2**31))
def test_adaptive_damping_has_the_radius_of_what_is_coupled(pattern, batch, size, seed):
    problem = Coupled(pattern, batch, size, seed, norm=3.0)
    jacobian = problem.jacobian().T
    if problem.is_coupled:
        lam = 1 / torch.linalg.eigvals(jacobian).abs().max().clamp(min=1)
    else:
        blocks = [jacobian[i : i + size, i : i + size] for i in range(0, batch * size, size)]
        radii = [torch.linalg.eigvals(block).abs().max().clamp(min=1) for block in blocks]
        lam = (1 / torch.stack(radii)).repeat_interleave(size)[:, None]
    image = lam * jacobian + (1 - lam) * torch.eye(batch * size, dtype=torch.float64)
    v = problem.v.flatten()
    want = (
        (lam * (v + image @ (v + image @ v))[:, None]).squeeze(1)
        if lam.dim()
        else lam * (v + image @ (v + image @ v))
    )
    got = quiet(problem.g, "npg(k=3, lam='adaptive')")
    # Ten products find the leading eigenvalue of up to ten dimensions exactly.
    if (batch if problem.is_coupled else 1) * size <= 10:
        assert (got - want).norm() <= 1e-6 * want.norm()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_is_found_is_said_once_and_names_batch_dim(pattern):
    problem = Coupled(pattern, 5, 2, 0)
    with pytest.warns(AssumptionWarning, match="batch_dim=None") as said:
        problem.g("ift")
        problem.g("ift")
    assert len(said) == 1


@pytest.mark.parametrize("batch", [2, 3, 7, 16, 33])
def test_every_pair_is_found_in_both_directions(batch):
    state = torch.zeros(batch, 2, dtype=torch.float64)

    def found(target, source):
        def func(h):
            out = 0.5 * h
            row = torch.zeros(batch, 1, dtype=h.dtype)
            row[target] = 1
            return out + 1e-6 * row * h[source]

        graph = Linearization(func, state)
        return mixes_samples(graph, Packing(graph.inputs, 0))

    pairs = list(itertools.permutations(range(batch), 2))
    assert all(found(target, source) for target, source in pairs[:: max(1, len(pairs) // 300)])
    graph = Linearization(lambda h: 0.5 * h, state)
    assert not mixes_samples(graph, Packing(graph.inputs, 0))


@given(
    st.sampled_from(PATTERNS), st.integers(2, 6), st.integers(0, 2**31), st.sampled_from(SOLVERS)
)
def test_said_to_be_independent_they_are_right_or_a_warning_comes(pattern, batch, seed, solver):
    """With `batch_dim=0` nobody asks; the residual is that of the whole system all the same."""
    problem, seen = Coupled(pattern, batch, 2, seed), []
    spec = f"ift(solver={solver!r}, tol=1e-7, max_iter=60)"
    context = dpp.Context(batch_dim=0, monitor=seen.append)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = problem.g(spec, context)
    eye = torch.eye(problem.v.numel(), dtype=torch.float64)
    v = problem.v.flatten()
    rest = (v - (eye - problem.jacobian().T) @ got).view(problem.v.shape)
    relative = rest.norm(dim=1) / problem.v.norm(dim=1)
    torch.testing.assert_close(seen[0].residual, relative, rtol=1e-3, atol=1e-10)
    assert bool((relative <= 1e-7).all()) or said


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_loss_of_some_samples_does_not_hide_the_others(solver):
    """Rows whose v is zero have a g where others reach into them."""
    problem = Coupled("all", 4, 2, 1)
    problem.v[1:] = 0
    want, spec = problem.exact(), f"ift(solver={solver!r}, tol=1e-9, max_iter=200)"
    assert (quiet(problem.g, spec) - want).norm() <= 1e-6 * want.norm()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = problem.g(spec, dpp.Context(batch_dim=0))
    assert (got - want).norm() <= 1e-6 * want.norm() or said


def test_guard_raises_where_samples_were_wrongly_said_to_be_independent():
    problem = Coupled("all", 6, 3, 0, norm=0.95)
    spec = "guard('ift(max_iter=6, tol=1e-9)', on_failure='raise', adjoint_tol=1e-6)"
    with pytest.raises(dpp.ConvergenceError, match="adjoint"):
        problem.g(spec, dpp.Context(batch_dim=0))


def test_shine_refines_the_blocks_that_the_solver_shares_as_one_system():
    from deq_phantom_plugin.forward import broyden

    problem = Coupled("all", 4, 3, 0)
    solution = broyden(
        problem, torch.zeros_like(problem.state), max_iter=30, tol=1e-9, keep_inverse=True
    )
    context = dpp.Context(solver_result=solution)
    want = problem.exact()

    def error(refine):
        got = quiet(problem.g, f"shine(refine={refine}, fallback=None)", context)
        return float((got - want).norm() / want.norm())

    assert error(30) < 1e-6
    assert error(30) < error(4)


@pytest.mark.parametrize("batch_dim", ["auto", 0])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_warm_start_that_others_reached_into_is_no_other_system(solver, batch_dim):
    """Taken back in some samples, it is missing in those that it had reached."""
    torch.manual_seed(49)
    mix = 0.4 * torch.randn(6, 6, dtype=torch.float64) / 6**0.5
    h, v = torch.zeros(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    memory = dpp.Memory()
    for step in range(6):
        coupled = float(step > 0)  # nothing to be found in the first step
        z = torch.zeros_like(h).requires_grad_()
        spec = f"ift(solver={solver!r}, warm_start=True, max_iter=100)"
        context = dpp.Context(batch_dim=batch_dim, memory=memory)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            func = lambda h, c=coupled, z=z: 0.3 * h + c * (mix @ h) + z  # noqa: E731
            dpp.attach(func, h, spec, context).backward(v)
        system = 0.7 * torch.eye(6, dtype=torch.float64) - coupled * mix.T
        want = torch.linalg.solve(system, v)
        assert (z.grad - want).norm() <= 1e-2 * want.norm() or said
        v = v.clone()
        v[torch.rand(6) < 0.4] = torch.randn(4, dtype=torch.float64)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("ratio", [1e-1, 1e-2, 1e-3])
def test_short_rows_in_float16_are_rows_of_the_same_system(solver, ratio):
    mix = torch.zeros(4, 4)
    mix[0, 1], mix[2, 3] = 0.4, 0.5
    v = torch.tensor([1.0, ratio, 1.0, ratio])[:, None].expand(4, 3)
    z = torch.zeros(4, 3, dtype=torch.float16, requires_grad=True)
    func = lambda h: 0.3 * h + mix.half() @ h + z  # noqa: E731
    dpp.attach(func, z.detach(), f"ift(solver={solver!r})", dpp.Context(0)).backward(v.half())
    want = torch.linalg.solve(0.7 * torch.eye(4) - mix.T, v)
    assert (z.grad.float() - want).norm() <= 20 * torch.finfo(torch.float16).eps * want.norm()


@pytest.mark.filterwarnings("ignore::deq_phantom_plugin.ConvergenceWarning")
@pytest.mark.parametrize("seed", [2, 8, 11, 20, 28, 30])
def test_a_solve_that_explodes_is_not_worse_than_none(seed):
    torch.manual_seed(seed)
    a, mix = 0.5 * torch.randn(3, 3) / 3**0.5, 0.3 * torch.randn(16, 16) / 4
    u, stats = torch.randn(16, 3, requires_grad=True), []
    h, v = torch.zeros(16, 3), torch.rand(16, 1).expand(16, 3) ** 3
    func = lambda h: h @ a.T + mix @ h + u  # noqa: E731
    try:
        dpp.attach(func, h, "ift", dpp.Context(0, monitor=stats.append)).backward(v)
    except dpp.NonFiniteError as error:
        assert "batch_dim=None" in str(error)  # noqa: PT017
        return
    assert u.grad.norm() <= 1e3 * v.norm()


# --- no false alarm ----------------------------------------------------------------------------


class FixedMask(nn.Module):
    """Dropout that draws once."""

    def __init__(self, shape):
        super().__init__()
        self.mask = torch.empty(shape).bernoulli_(0.7)

    def forward(self, x):
        return x * self.mask


def independent_maps():
    conv = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU())
    conv.to(memory_format=torch.channels_last)
    attention = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    frozen = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).eval()
    linear, layer = nn.Linear(6, 6), nn.LayerNorm(6)
    mask = FixedMask((7, 6))
    return {
        "linear": (lambda h: torch.tanh(0.5 * linear(h)), torch.randn(7, 6)),
        "layer norm": (lambda h: layer(0.5 * linear(h)), torch.randn(7, 6)),
        "a fixed mask": (lambda h: mask(0.5 * linear(h)), torch.randn(7, 6)),
        "frozen batch norm": (lambda h: 0.3 * frozen(h), torch.randn(7, 6)),
        "convolutions": (
            lambda h: 0.3 * conv(h),
            torch.randn(5, 4, 6, 6).contiguous(memory_format=torch.channels_last),
        ),
        "attention": (lambda h: 0.3 * attention(h), torch.randn(5, 3, 8)),
        "two leaves": (lambda h: [0.3 * h[1], 0.3 * h[0]], [torch.randn(6, 2), torch.randn(6, 2)]),
        "bfloat16": (
            lambda h: 0.5 * torch.tanh(h @ torch.ones(6, 6, dtype=h.dtype) / 6),
            torch.randn(9, 6).bfloat16(),
        ),
        "no samples": (lambda h: 0.5 * h, torch.randn(0, 6)),
        "no elements": (lambda h: 0.5 * h, torch.randn(4, 0)),
        "one sample": (lambda h: 0.5 * torch.tanh(linear(h)), torch.randn(1, 6)),
        "float16": (lambda h: 0.5 * torch.tanh(h), torch.randn(9, 6).half()),
        "complex": (lambda h: 0.5 * h, torch.randn(4, 3, dtype=torch.complex64)),
    }


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", independent_maps())
def test_no_false_alarm(name, autocast):
    func, state = independent_maps()[name]
    seen = []

    @dpp.register_strategy("spy", replace=True)
    class Spy(dpp.GradStrategy):
        assumes_equilibrium = False

        def attach(self, func, equilibrium, context):
            seen.append(context.batch_dim)
            return func(equilibrium)

    with warnings.catch_warnings():
        warnings.simplefilter("error", AssumptionWarning)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            dpp.attach(func, state, "spy")
    assert seen == [0]


def test_leaves_of_different_sizes_are_one_system_and_nobody_looks_for_samples():
    calls = []

    def func(state):
        calls.append(1)
        return [0.5 * state[0], 0.5 * state[1]]

    seen = []

    def strategy(func, equilibrium, context):
        seen.append(context.batch_dim)
        return func(equilibrium)

    dpp.attach(func, [torch.zeros(2, 3), torch.zeros(4, 3)], strategy)
    assert seen == [None]
    assert len(calls) == 3  # two looks at the map, and the strategy


@pytest.mark.parametrize("batch_dim", [True, "0", "batch", 1.5, [0]])
def test_a_batch_dim_that_is_none_is_named(batch_dim):
    with pytest.raises(ValueError, match=r"batch_dim=.*expected a dimension such as 0, None"):
        dpp.Context(batch_dim=batch_dim)


# --- what it costs, and when -------------------------------------------------------------------


class Normed(nn.Module):
    """A model of its own loop, with batch normalisation inside F and a memory."""

    def __init__(self, grad="ift(tol=1e-5)"):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.memory, self.grad = dpp.Memory(), grad
        self.evaluations = 0

    def func(self, x):
        def func(h):
            self.evaluations += 1
            return torch.tanh(0.1 * self.norm(self.linear(h)) + x)

        return func

    def forward(self, x, batch_dim="auto"):
        func = self.func(x)
        with torch.no_grad():
            h = torch.zeros_like(x)
            for _ in range(60):
                h = func(h)
        self.evaluations = 0
        return dpp.attach(func, h, self.grad, dpp.Context(batch_dim=batch_dim, memory=self.memory))


@pytest.fixture
def ignored():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AssumptionWarning)
        yield


@pytest.mark.usefixtures("ignored")
def test_it_is_asked_once_for_each_mode_and_not_for_each_size():
    model = Normed()

    def cost(batch=6):
        model(torch.randn(batch, 4)).sum().backward()
        return model.evaluations

    plain = 1  # the one that ift takes
    assert cost() == plain + 2
    assert cost() == plain
    assert cost(9) == plain
    model.norm.eval()  # another map: nothing is coupled any more
    assert cost() == plain + 2
    assert cost() == plain
    model.norm.train()
    assert cost() == plain + 2
    model.eval()
    assert cost() == plain + 2
    assert cost() == plain
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not other.memory.findings  # asks for itself


@pytest.mark.usefixtures("ignored")
def test_one_sample_tells_nothing_of_the_next_batch():
    model = Normed()
    model.norm.eval()
    model(torch.randn(1, 4)).sum().backward()
    model(torch.randn(1, 4)).sum().backward()
    assert model.evaluations == 1
    model(torch.randn(5, 4)).sum().backward()
    assert model.evaluations == 3


@pytest.mark.parametrize("spec", ["jfb", "upg", "npg", "npg_rr", "bptt(steps=2)"])
def test_where_it_does_not_matter_nobody_asks(spec):
    model = Normed(spec)
    model(torch.randn(5, 4)).sum().backward()
    assert not model.memory.findings


@pytest.mark.parametrize("batch_dim", [0, None])
def test_what_is_told_is_not_asked(batch_dim):
    model = Normed("ift(tol=1e-4)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dpp.ConvergenceWarning)
        model(torch.randn(5, 4), batch_dim).sum().backward()
    assert not model.memory.findings
    assert model.evaluations == 1


@pytest.mark.usefixtures("ignored")
def test_random_state_and_buffers_are_left_as_they_were():
    asked, plain = Normed(), Normed()
    x = torch.randn(5, 4)
    torch.manual_seed(1)
    asked(x).sum().backward()
    first = torch.rand(3)
    torch.manual_seed(1)
    plain(x, batch_dim=None).sum().backward()
    assert torch.equal(first, torch.rand(3))
    for (name, a), b in zip(asked.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(asked.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.usefixtures("ignored")
def test_weights_that_begin_at_zero_are_asked_about_again():
    """At first nothing is coupled, then everything: found once a solve has stopped short."""
    torch.manual_seed(0)
    mix = torch.zeros(6, 6, requires_grad=True)
    weight, u = 0.3 * torch.randn(4, 4), torch.randn(6, 4)
    memory = dpp.Memory()

    def func(h):
        return torch.tanh(h @ weight + mix @ h + u)

    def g():
        h = torch.zeros(6, 4)
        with torch.no_grad():
            for _ in range(300):
                h = func(h)
        context = dpp.Context(memory=memory)
        attached = dpp.attach(func, h, "ift(tol=1e-5, max_iter=20)", context)
        torch.autograd.grad(attached.square().sum(), mix)
        return next((found.coupled for found in memory.findings.values()), None)

    assert g() is False
    with torch.no_grad():
        mix += 0.8 * torch.linalg.qr(torch.randn(6, 6)).Q
    with pytest.warns(dpp.ConvergenceWarning, match="batch_dim"):
        g()
    assert g() is True


@pytest.mark.usefixtures("ignored")
@pytest.mark.parametrize("spec", ["ift(max_iter=200)", "guard('ift(max_iter=200)')", "exact"])
def test_maps_that_share_a_memory_are_told_apart(spec):
    """One solver for an encoder of independent samples and a decoder that mixes them."""
    from torchdeq import get_deq

    torch.manual_seed(0)
    a, b = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    weight = torch.linspace(0, 3, 6, dtype=torch.float64)[:, None]

    def encoder(z):
        return lambda h: torch.tanh(0.5 * a(h) + z)

    def decoder(z):
        return lambda h: torch.tanh(0.4 * b(h) + 0.4 * torch.softmax(h @ h.T, -1) @ h + z)

    def gradient(solve):
        loss = (weight * solve(decoder(solve(encoder(x))))).sum()
        grads = torch.autograd.grad(loss, [*a.parameters(), *b.parameters()])
        return torch.cat([grad.flatten() for grad in grads])

    def unrolled(func):
        h = torch.zeros_like(x)
        for _ in range(150):
            h = func(h)
        return h

    want = gradient(unrolled)
    with dpp.enabled("torchdeq"):
        deq = get_deq(grad=spec, f_solver="fixed_point_iter", f_max_iter=200, f_tol=1e-12)
        for _ in range(3):
            got = gradient(lambda func: deq(func, torch.zeros_like(x))[0][-1])
            assert (got - want).norm() <= 1e-3 * want.norm()


@pytest.mark.usefixtures("ignored")
def test_a_guard_asks_again_too():
    """What was found at weights of zero is doubted by whoever solves."""
    torch.manual_seed(0)
    mix, u = torch.zeros(6, 6), torch.randn(6, 4)
    memory = dpp.Memory()

    def func(h):
        return torch.tanh(0.2 * h + mix @ h + u)

    def coupled():
        h = torch.zeros(6, 4)
        with torch.no_grad():
            for _ in range(200):
                h = func(h)
        context = dpp.Context(memory=memory)
        dpp.attach(func, h.clone(), "guard('ift(tol=1e-6, max_iter=12)')", context)
        extra = torch.zeros_like(h, requires_grad=True)
        attached = dpp.attach(
            lambda h: func(h) + extra, h, "guard('ift(tol=1e-6, max_iter=12)')", context
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", dpp.ConvergenceWarning)
            attached.square().sum().backward()
        return [found.coupled for found in memory.findings.values()]

    assert not any(coupled())
    mix += 0.7 * torch.linalg.qr(torch.randn(6, 6)).Q
    coupled()
    assert any(coupled())


@pytest.mark.usefixtures("ignored")
def test_it_is_asked_again_after_seven_uses_and_every_sixty_one():
    model = Normed("npg(k=1, lam='adaptive')")
    model.norm.eval()
    asked = []
    for use in range(130):
        model(torch.randn(3, 4))
        assert model.evaluations in (1, 3)
        if model.evaluations == 3:
            asked.append(use)
    assert asked == [0, 7, 17, 31, 61, 122]


@pytest.mark.usefixtures("ignored")
@pytest.mark.parametrize("spec", ["npg(k=9, lam='adaptive')", "upg(k=3, lam='adaptive')"])
def test_a_coupling_that_grows_from_zero_is_found_within_sixty_one_steps(spec):
    torch.manual_seed(0)
    gate, mix = torch.zeros((), dtype=torch.float64), torch.randn(5, 5, dtype=torch.float64)
    memory, h = dpp.Memory(), torch.randn(5, 3, dtype=torch.float64)

    def func(h):
        return 0.4 * h + gate * (mix @ h)

    for step in range(70):
        gate.fill_(0.1 * step)
        dpp.attach(func, h, spec, dpp.Context(memory=memory))
    (found,) = memory.findings.values()
    assert found.coupled


@pytest.mark.parametrize("seed", range(5))
def test_what_cancels_but_for_rounding_couples_nothing(seed):
    """A softmax by hand that subtracts the largest number of the whole batch."""
    torch.manual_seed(seed)
    linear, x = nn.Linear(6, 6), torch.randn(8, 6)

    def func(h):
        scores = linear(h)
        weights = torch.exp(scores - scores.max())
        return torch.tanh(weights / weights.sum(-1, keepdim=True) + x)

    assert inspect_map(func, torch.randn(8, 6)).coupled is False


def test_modules_made_anew_in_each_step_leave_nothing_behind():
    memory, x = dpp.Memory(), torch.zeros(3, 4)

    def step():
        module = nn.Linear(4, 4, bias=False)
        dpp.attach(lambda h: 0.1 * module(h) + x, x, "ift", dpp.Context(memory=memory))

    for _ in range(20):
        step()
    gc.collect()
    step()
    assert len(memory.findings) <= 2


def test_third_party_strategies_see_a_dimension_or_none():
    seen = []

    def mine(func, equilibrium, context):
        seen.append(context.batch_dim)
        return func(equilibrium)

    problem = Coupled("pair", 4, 2, 0)
    quiet(problem.g, mine)
    dpp.attach(lambda h: 0.5 * h, torch.zeros(3, 2), mine)
    assert seen == [None, 0]


# --- under TorchDEQ ----------------------------------------------------------------------------


@pytest.mark.usefixtures("ignored")
@pytest.mark.parametrize("spec", ["ift(tol=1e-10, max_iter=200)", "exact", "shine(refine=60)"])
def test_batch_norm_under_torchdeq_is_backpropagation_through_many_steps(spec):
    from torchdeq import get_deq

    torch.manual_seed(0)
    linear, norm = nn.Linear(4, 4).double(), nn.BatchNorm1d(4).double()
    x = torch.randn(7, 4, dtype=torch.float64)
    weight = torch.linspace(0, 3, 7, dtype=torch.float64)[:, None]

    def func(h):
        return torch.tanh(0.15 * norm(linear(h)) + x)

    def gradient(h):
        loss = (weight * h.square()).sum()
        params = [*linear.parameters(), *norm.parameters()]
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)])

    h = start = torch.zeros_like(x)
    for _ in range(200):
        h = func(h)
    want = gradient(h)
    with dpp.enabled("torchdeq"):
        solver = "broyden_fast" if "shine" in spec else "fixed_point_iter"
        deq = get_deq(grad=spec, f_solver=solver, f_max_iter=300, f_tol=1e-13)
        for _ in range(2):  # the second knows what the first has found
            got = gradient(deq(func, start)[0][-1])
            assert (got - want).norm() <= 1e-6 * want.norm()
