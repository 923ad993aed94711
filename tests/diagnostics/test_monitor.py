"""Monitoring in training: the numbers are right, and the training does not notice."""

from __future__ import annotations

import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import deq_phantom_plugin as dpp
from deq_phantom_plugin.hosts import find_equilibria
from deq_phantom_plugin.patching import Equilibrium

torchdeq = pytest.importorskip("torchdeq")


class Net(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.encoder, self.layer, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.dropout = nn.Dropout(0.2)
        self.deq = torchdeq.get_deq(f_tol=1e-12, f_max_iter=200, **settings)

    def forward(self, x):
        u = self.dropout(self.encoder(x))
        states, _ = self.deq(lambda h: torch.tanh(0.5 * self.layer(h) + u), torch.zeros_like(u))
        return self.head(states[-1])


def net(seed=0, **settings):
    torch.manual_seed(seed)
    return Net(**settings).double()


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 5, dtype=torch.float64, generator=generator)


class Log:
    """A writer that remembers."""

    def __init__(self):
        self.entries = []

    def __call__(self, numbers, step):
        self.entries.append((step, dict(numbers)))

    @property
    def steps(self):
        return [step for step, _ in self.entries]


def train(model, steps, told=True, accumulate=1):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.manual_seed(1)
    losses = []
    for step in range(steps):
        if told:
            dpp.set_step(model, step)
        optimizer.zero_grad()
        for part in range(accumulate):
            loss = model(batch(accumulate * step + part)).square().mean()
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("settings", [{"grad": "npg(k=3)"}, {"grad": 3, "tau": 0.5}])
def test_the_numbers_are_those_of_dense_jacobians(settings):
    dpp.enable()
    model, log = net(**settings), Log()
    model.dropout.p = 0.0
    x = batch(0)
    with dpp.monitor(model, log, every=1):
        model(x).square().mean().backward()
    ((step, numbers),) = log.entries
    assert step == 0
    u = model.encoder(x).detach()
    h = torch.zeros_like(u)
    with torch.no_grad():
        for _ in range(300):
            h = torch.tanh(0.5 * model.layer(h) + u)
    weight = 0.5 * model.layer.weight.detach()
    jacobians = (1 - h.square())[:, :, None] * weight
    leading = torch.linalg.eigvals(jacobians).abs().amax()
    assert numbers["deq/spectral_radius"] == pytest.approx(float(leading), rel=2e-2)
    assert numbers["deq/forward_residual"] < 1e-10
    assert numbers["deq/nfe"] > 5
    assert numbers["deq/reference_residual"] <= 1e-5

    state = h.clone().requires_grad_()
    (v,) = torch.autograd.grad(model.head(state).square().mean(), state)
    damped = 0.5 * jacobians.mT + 0.5 * torch.eye(8, dtype=torch.float64)
    g = sum(0.5 * torch.linalg.matrix_power(damped, t) @ v[:, :, None] for t in range(3))
    residual = v[:, :, None] - g + jacobians.mT @ g
    assert numbers["deq/adjoint_residual"] == pytest.approx(
        float(residual.norm() / v.norm()), rel=1e-2
    )
    exact = torch.linalg.solve(torch.eye(8, dtype=torch.float64) - jacobians.mT, v[:, :, None])

    def gradient(cotangent):
        model.zero_grad()
        torch.tanh(0.5 * model.layer(h) + model.encoder(x)).backward(cotangent.squeeze(2))
        inside = [*model.layer.parameters(), *model.encoder.parameters()]
        return torch.cat([p.grad.flatten() for p in inside])

    cosine = F.cosine_similarity(gradient(g), gradient(exact), dim=0)
    assert numbers["deq/cosine"] == pytest.approx(float(cosine), abs=2e-3)


@pytest.mark.parametrize("grad", ["upg(lam='adaptive')", "ift", 4])
def test_training_is_the_same_with_and_without(grad):
    dpp.enable()
    plain, watched, log = net(grad=grad), net(grad=grad), Log()
    with dpp.monitor(watched, log, every=2):
        assert train(watched, 6) == train(plain, 6)
    assert log.steps == [0, 2, 4]
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)
    assert plain.state_dict().keys() == watched.state_dict().keys()


def test_steps_come_from_set_step_and_accumulation_logs_once():
    dpp.enable()
    model, log = net(grad="jfb"), Log()
    with dpp.monitor(model, log, every=3):
        train(model, 7, accumulate=2)
    assert log.steps == [0, 3, 6]


def test_without_set_step_forward_passes_are_counted():
    model, log = net(grad=2), Log()
    with dpp.monitor(model, log, every=3):
        train(model, 7, told=False)
        model.eval()
        model(batch(0))
    assert log.steps == [0, 3, 6]


def test_evaluation_and_passes_without_backward_log_nothing():
    model, log = net(grad=2), Log()
    with dpp.monitor(model, log, every=1):
        model(batch(0))
        with torch.no_grad():
            model(batch(0))
        model.eval()
        model(batch(0)).sum().backward()
    assert log.entries == []


def test_summary_writers_get_one_scalar_a_number():
    class SummaryWriter:
        def __init__(self):
            self.scalars = []

        def add_scalar(self, tag, scalar_value, global_step):
            self.scalars.append((tag, scalar_value, global_step))

    model, writer = net(grad=2), SummaryWriter()
    with dpp.monitor(model, writer=writer, every=1):
        train(model, 2, told=False)
    tags = {tag for tag, _, _ in writer.scalars}
    assert tags == {
        f"deq/{name}"
        for name in (
            "forward_residual",
            "nfe",
            "adjoint_residual",
            "spectral_radius",
            "cosine",
            "reference_residual",
        )
    }
    assert sorted({step for _, _, step in writer.scalars}) == [0, 1]
    assert all(isinstance(value, float) for _, value, _ in writer.scalars)


@pytest.mark.parametrize(
    "spec", ["npg(k=4, lam=1.0, clip={})", "ift(solver='fixed_point', tol=1e-10, clip={})"]
)
@pytest.mark.filterwarnings("ignore::deq_phantom_plugin.ConvergenceWarning")
def test_clipped_products_are_counted_as_in_the_training_itself(spec):
    dpp.enable()
    model, log, told = net(grad="jfb"), Log(), []
    model.dropout.p = 0.0
    with dpp.monitor(model, log, every=1):
        for step, clip in enumerate((1e6, 0.2, 1e6)):
            dpp.set_grad(model, spec.format(clip))
            dpp.set_step(model, step)
            model(batch(0)).square().mean().backward()
    assert "deq/clipped" not in log.entries[0][1]
    u = model.encoder(batch(0)).detach().requires_grad_()
    h = torch.zeros_like(u)
    with torch.no_grad():
        for _ in range(300):
            h = torch.tanh(0.5 * model.layer(h) + u)
    context = dpp.Context(batch_dim=0, monitor=told.append)
    func = lambda h: torch.tanh(0.5 * model.layer(h) + u)  # noqa: E731
    model.head(dpp.attach(func, h, spec.format(0.2), context)).square().mean().backward()
    counted = [entry["deq/clipped"] for _, entry in log.entries[1:]]
    assert counted == [told[0].n_clipped, 0.0]
    assert counted[0] > 6


def test_it_outlives_a_switch_of_strategy_and_ends_when_removed():
    dpp.enable()
    model, log = net(grad=2), Log()
    handle = dpp.monitor(model, log, every=1)
    train(model, 1, told=False)
    dpp.set_grad(model, "exact")
    train(model, 1, told=False)
    assert log.entries[0][1]["deq/adjoint_residual"] > 1e-3
    assert log.entries[1][1]["deq/adjoint_residual"] < 1e-10
    handle.remove()
    handle.remove()
    train(model, 1, told=False)
    assert len(log.entries) == 2
    assert not model.deq._forward_hooks
    assert not model.deq._forward_pre_hooks


@pytest.mark.parametrize(
    ("grad", "steps", "nfe"), [("bptt(steps=7)", 7, 7), ("reversible(steps=4, beta=0.5)", 4, 8)]
)
def test_a_solve_that_a_strategy_owns_is_measured_where_it_ended(grad, steps, nfe):
    dpp.enable()
    model, log = net(grad=grad), Log()
    model.dropout.p = 0.0
    with dpp.monitor(model, log, every=1):
        model(batch(0)).square().mean().backward()
    numbers = log.entries[0][1]
    u = model.encoder(batch(0)).detach()
    func = lambda h: torch.tanh(0.5 * model.layer(h) + u)  # noqa: E731
    y = z = torch.zeros_like(u)
    with torch.no_grad():
        for _ in range(steps):
            if grad.startswith("bptt"):
                z = func(z)
            else:
                y = (y + func(z)) / 2
                z = (z + func(y)) / 2
        residual = (func(z) - z).norm(dim=1) / func(z).norm(dim=1)
    assert 0 < residual.max() < 0.5
    assert numbers["deq/forward_residual"] == pytest.approx(float(residual.mean()), rel=1e-6)
    assert numbers["deq/nfe"] == nfe
    assert numbers["deq/cosine"] > 0.9


def test_an_overflow_of_a_loss_scaler_is_left_out():
    model, log = net(grad=2), Log()
    with dpp.monitor(model, log, every=1):
        (model(batch(0)).sum() * torch.inf).backward()
    assert log.entries[0][1].keys() == {"deq/forward_residual", "deq/nfe"}


def test_what_goes_wrong_is_said_and_does_not_stop_the_training(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("out of luck")

    monkeypatch.setattr("deq_phantom_plugin.diagnostics.measure.problem.spectral_radius", fails)
    model, log = net(grad=2), Log()
    with (
        dpp.monitor(model, log, every=1),
        pytest.warns(UserWarning, match="monitor: deq, step 0: RuntimeError: out of luck"),
    ):
        train(model, 1, told=False)
    assert log.entries[0][1].keys() == {"deq/forward_residual", "deq/nfe"}


def test_graphs_are_freed_with_and_without_a_backward_pass(no_gc):
    model, log, graphs = net(grad=2), Log(), []
    # The injection lives as long as any graph that F was built into.
    model.encoder.register_forward_hook(lambda *args: graphs.append(weakref.ref(args[-1])))
    with dpp.monitor(model, log, every=1):
        out = model(batch(0))
        del out
        loss = model(batch(0)).sum()
        loss.backward()
        del loss
        assert [graph() for graph in graphs] == [None, None]
    assert len(log.entries) == 1


def test_under_autocast_f_is_measured_as_it_was_trained():
    seen = []

    class Mixed(Net):
        def forward(self, x):
            u = self.encoder(x).float()

            def f(h):
                image = self.layer(h)
                seen.append(image.dtype)
                return torch.tanh(0.5 * image.float() + u)

            return self.head(self.deq(f, torch.zeros_like(u))[0][-1])

    torch.manual_seed(0)
    model, log = Mixed(grad=2), Log()
    with dpp.monitor(model, log, every=1):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(batch(0).float()).float().mean()
        loss.backward()
    assert set(seen) == {torch.bfloat16}
    assert log.entries[0][1]["deq/cosine"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"every": 0}, "every=0"),
        ({"writer": "log.txt"}, "writer='log.txt'; expected a SummaryWriter or a callable"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_watched(change, message):
    model = net(grad=2)
    with pytest.raises(ValueError, match=message):
        dpp.monitor(**{"model": model, "writer": print, **change})
    assert not model.deq._forward_hooks


class Own(nn.Module):
    """A solve of its own, with dropout and, outside of the model, a batch norm inside F."""

    def __init__(self, grad="ift(max_iter=9)", inner=None):
        super().__init__()
        self.encoder, self.layer = nn.Linear(5, 8), nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.2)
        self.equilibrium = Equilibrium(grad)
        self.inner = None if inner is None else Equilibrium(inner)
        self.elsewhere = (nn.BatchNorm1d(8),)  # in a tuple it is no part of the model
        self.dtypes = []

    def forward(self, x):
        u = self.encoder(x)

        def func(h):
            image = self.elsewhere[0](self.layer(self.dropout(h)))
            self.dtypes.append(self.layer(h).dtype)
            if self.inner is not None:
                image = self.inner(lambda k: 0.3 * torch.tanh(k + image), torch.zeros_like(image))
            return torch.tanh(0.5 * image + u)

        h = torch.zeros_like(u)
        with torch.no_grad():
            for _ in range(9):
                h = func(h)
        return self.equilibrium(func, h)


def ended(every, between=lambda model: None, autocast=False, **settings):
    """What is left of a training, the state of F's own modules included, and the steps logged."""
    torch.manual_seed(0)
    model, log = Own(**settings), Log()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    handle = every and dpp.monitor(model, log, every=every)
    torch.manual_seed(1)
    for step in range(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = model(batch(step).float())
        out.square().mean().backward()
        optimizer.step()
        between(model)
    if handle:
        handle.remove()
    state = {**model.state_dict(), "random": torch.get_rng_state()}
    return {**state, **model.elsewhere[0].state_dict(prefix="elsewhere.")}, log, model


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.filterwarnings("ignore")  # with dropout in F nothing converges
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"autocast": True},
        {"inner": "jfb"},
        {"inner": "ift(warm_start=True)"},
        {"inner": "upg(lam='adaptive')"},
    ],
)
def test_modules_outside_the_model_and_equilibria_inside_f_are_left_alone(settings):
    plain, _, _ = ended(None, **settings)
    watched, log, model = ended(2, **settings)
    assert_same(plain, watched)
    outer = [step for step, numbers in log.entries if "equilibrium/cosine" in numbers]
    inner = [step for step, numbers in log.entries if "inner/cosine" in numbers]
    assert outer == [0, 2]
    assert inner == ([0, 2] if "inner" in settings else [])  # once, however many products
    assert set(model.dtypes) == {torch.bfloat16 if settings.get("autocast") else torch.float32}


@pytest.mark.filterwarnings("ignore")
def test_a_report_in_between_is_noticed_neither_by_training_nor_by_the_monitor():
    def report(model):
        loss = lambda h: h.square().mean()  # noqa: E731
        dpp.model_report(model, batch(9).float(), loss, ["jfb", "npg"], repeats=1)

    plain, _, _ = ended(None)
    watched, log, _ = ended(2, between=report)
    assert_same(plain, watched)
    assert log.steps == [0, 2]


@pytest.mark.filterwarnings("ignore:h is no equilibrium")
def test_a_residual_is_that_of_f_as_the_solve_saw_it():
    model, solves = Own(), []
    model.dropout.p = 0.0
    ((host, module),) = find_equilibria(model)
    end = host.observe(module, solves.append)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.warns(dpp.AssumptionWarning, match="depend on one another"):
            model(batch(0).float())
        now = solves[0].residual
        model(batch(0).float())
    end()
    model.dtypes.clear()
    torch.testing.assert_close(solves[1].residual, now, rtol=0.2, atol=1e-2)  # later, outside
    assert model.dtypes == [torch.bfloat16]


def test_a_warning_that_was_given_is_not_given_again_for_a_measurement():
    dpp.enable()
    model = net(grad="ift(tol=1e-12, max_iter=1)")
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        with dpp.monitor(model, Log(), every=1):
            train(model, 3)
    assert len([w for w in given if issubclass(w.category, dpp.ConvergenceWarning)]) == 1


def test_behind_compiled_code_nothing_is_differentiated_and_the_training_is_the_same():
    """A second backward pass through compiled code is refused, or spoils the first."""

    def run(every):
        torch.compiler.reset()
        model, log = net(grad=2), Log()
        model.encoder.forward = torch.compile(model.encoder.forward, backend="aot_eager")
        train(model, 2)  # compiles the backward pass as it is without a monitor
        handle = every and dpp.monitor(model, log, every=every)
        train(model, 4)
        if handle:
            handle.remove()
        return model.state_dict(), log

    plain, _ = run(None)
    with pytest.warns(dpp.AssumptionWarning, match="F captures what compiled code") as given:
        watched, log = run(2)
    assert len(given) == 1
    assert_same(plain, watched)
    assert all(0.5 < numbers["deq/cosine"] <= 1 + 1e-9 for _, numbers in log.entries)
    assert log.steps == [0, 2]


@pytest.mark.parametrize("grad", ["bptt(steps=3)", pytest.param("upg", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::deq_phantom_plugin.AssumptionWarning")
def test_a_compiled_model_trains_the_same(grad):
    """What is told to observers is not part of what is compiled: its gradients came out wrong."""
    dpp.enable()

    def run(every):
        torch.compiler.reset()
        model, log = net(grad=grad), Log()
        handle = every and dpp.monitor(model, log, every=every)
        compiled = torch.compile(model, backend="aot_eager")
        losses = train(compiled, 4, told=False)
        if handle:
            handle.remove()
        return losses, model.state_dict(), log

    (plain, before, _), (watched, after, log) = run(None), run(2)
    assert watched == plain
    assert_same(before, after)
    assert log.steps == [0, 2]
    assert all("deq/cosine" in numbers for _, numbers in log.entries)
