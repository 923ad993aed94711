"""Solves by dpp.Equilibrium, hosts without an entry point, and models with neither."""

from __future__ import annotations

import copy
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

import deq_phantom_plugin as dpp
from deq_phantom_plugin.cli import main
from deq_phantom_plugin.forward import broyden
from deq_phantom_plugin.hosts import Host, PatchingHost, attach_observed, find_equilibria
from deq_phantom_plugin.hosts import registry as hosts
from deq_phantom_plugin.testing import NESTINGS, make_equilibrium

SOLVERS = ["anderson", "broyden", "fixed_point"]
TIGHT = {"tol": 1e-11, "max_iter": 500}


class Net(nn.Module):
    """tanh of a layer, solved by an Equilibrium."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 5)
        self.evaluations = 0
        self.equilibrium = dpp.Equilibrium(*args, **kwargs)

    def func(self, x):
        def func(h):
            self.evaluations += 1
            return torch.tanh(0.6 * self.layer(h) + x)

        return func

    def forward(self, x, start=None):
        return self.equilibrium(self.func(x), torch.zeros_like(x) if start is None else start)


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(4, 5, dtype=torch.float64, generator=generator)


def zeros(state):
    leaves, structure = tree_flatten(state)
    return torch.utils._pytree.tree_unflatten([torch.zeros_like(x) for x in leaves], structure)


# --- the solve and its gradient ------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("n_leaves", "nest"), [n[1:] for n in NESTINGS], ids=[n[0] for n in NESTINGS]
)
def test_the_gradient_is_that_of_a_dense_solve_for_any_state(solver, n_leaves, nest):
    known = make_equilibrium([(3, 2), (3, 4), (3,)][:n_leaves], nest)
    equilibrium = dpp.Equilibrium(solver, "ift(tol=1e-12, max_iter=200)", **TIGHT)
    found = equilibrium(known.func, zeros(known.state))
    assert tree_flatten(found)[1] == tree_flatten(known.state)[1]
    got = torch.autograd.grad(known.linear_loss(found), known.params)
    want = known.gradient("exact", dpp.Context(batch_dim=0))
    torch.testing.assert_close(torch.cat([g.flatten() for g in got]), want, rtol=1e-8, atol=1e-8)
    for leaf, like in zip(tree_flatten(found)[0], known.leaves, strict=True):
        torch.testing.assert_close(leaf, like, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64, torch.complex128]
)
def test_any_dtype(solver, dtype, x):
    weight = (0.3 * torch.eye(5)).to(dtype).requires_grad_()
    u = x.to(dtype)
    equilibrium = dpp.Equilibrium(solver, "npg", tol=3e-2)
    h = equilibrium(lambda h: torch.tanh(h @ weight + u), torch.zeros_like(u))
    h.abs().sum().backward()
    assert h.dtype is dtype
    assert (equilibrium.last.residual <= 3e-2).all()
    assert weight.grad.isfinite().all()
    assert weight.grad.any()


def test_what_a_solve_reached_and_took(x):
    model = Net("broyden", "npg", tol=1e-3).double()
    assert model.equilibrium.last is None
    with torch.no_grad():
        h = model(x)
    last, func = model.equilibrium.last, model.func(x)
    assert int(last.nfe) == model.evaluations
    with torch.no_grad():
        want = (func(h) - h).norm(dim=1) / func(h).norm(dim=1)
    torch.testing.assert_close(last.residual, want, rtol=1e-4, atol=1e-7)
    assert (want < 1e-3).all()


def test_nothing_that_is_kept_carries_a_graph(x, no_gc):
    model = Net(grad="upg").double()
    injection = x.clone().requires_grad_()
    held = weakref.ref(injection)
    model(injection)
    assert not model.equilibrium.last.residual.requires_grad
    del injection
    assert held() is None
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.equilibrium.last is None
        assert twin.equilibrium.grad == model.equilibrium.grad
        torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("spec", ["bptt(steps=3)", "schedule({0: 'bptt(steps=3)', 5: 'ift'})"])
def test_a_strategy_that_solves_begins_at_h0_and_is_alone(spec, x):
    model = Net(grad=spec).double()
    dpp.set_step(model, 0)
    start = torch.full_like(x, 0.2).requires_grad_()
    h = model(x, start)
    assert model.evaluations == 3 + 1  # one for the residual that is told
    assert int(model.equilibrium.last.nfe) == 3
    want = start
    for _ in range(3):
        want = model.func(x)(want)
    torch.testing.assert_close(h, want, rtol=0, atol=0)
    inputs = [start, *model.layer.parameters()]
    for got, expected in zip(
        torch.autograd.grad(h.square().sum(), inputs),
        torch.autograd.grad(want.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_by_hand_bptt_starts_at_the_initial_state_of_the_context(x):
    layer = nn.Linear(5, 5).double()

    def func(h):
        return torch.tanh(0.6 * layer(h) + x)

    start, elsewhere = torch.full_like(x, 0.2), torch.full_like(x, -0.4)
    context = dpp.Context(initial_state=start)
    for spec in ("bptt(steps=1)", "reversible(steps=1, beta=0.5)"):
        got = dpp.attach(func, elsewhere, spec, context)
        torch.testing.assert_close(got, dpp.attach(func, start, spec))
        assert not torch.allclose(got, dpp.attach(func, elsewhere, spec))
    torch.testing.assert_close(dpp.attach(func, elsewhere, "bptt(steps=1)", context), func(start))


def test_shine_has_what_broyden_learned(x):
    model = Net("broyden", "shine", tol=1e-6).double()
    got = torch.autograd.grad(model(x).square().sum(), model.layer.weight)
    solution = broyden(
        model.func(x),
        torch.zeros_like(x),
        max_iter=50,
        tol=1e-6,
        stop_mode="rel",
        keep_inverse=True,
    )
    context = dpp.Context(batch_dim=0, solver_result=solution)
    h = dpp.attach(model.func(x), solution.state, "shine", context)
    want = torch.autograd.grad(h.square().sum(), model.layer.weight)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="inverse-Jacobian estimate"):
        Net("anderson", "shine").double()(x)


@pytest.mark.parametrize("solver", SOLVERS)
def test_coupled_samples_are_found_out_and_solved_as_one(solver):
    generator = torch.Generator().manual_seed(5)
    a = 0.9 * torch.rand(6, 6, dtype=torch.float64, generator=generator) / 6
    u = torch.randn(6, 3, dtype=torch.float64, generator=generator)
    weight = a.clone().requires_grad_()
    equilibrium = dpp.Equilibrium(solver, "upg(k=60, lam=1.0)", **TIGHT)
    eye = torch.eye(6, dtype=torch.float64)
    want = torch.linalg.solve(eye - a, u)
    slope = torch.linalg.solve(eye - a.T, torch.ones_like(u)) @ want.T
    with pytest.warns(dpp.AssumptionWarning, match="batch_dim"):  # solving, and attaching
        equilibrium(lambda h: weight @ h + u, torch.zeros_like(u))
        h = equilibrium(lambda h: weight @ h + u, torch.zeros_like(u))
    assert equilibrium.last.residual.shape == (1,)
    torch.testing.assert_close(h, want, rtol=1e-8, atol=1e-8)
    (got,) = torch.autograd.grad(h.sum(), weight)
    torch.testing.assert_close(got, slope, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("solver", SOLVERS)
def test_samples_may_be_along_any_dimension(solver, x):
    model = Net(solver, "jfb").double()
    columns = dpp.Equilibrium(solver, "jfb", batch_dim=1)
    with torch.no_grad():
        h = columns(lambda h: model.func(x)(h.mT).mT, torch.zeros_like(x.mT))
        torch.testing.assert_close(h.mT, model(x))
    torch.testing.assert_close(columns.last.residual, model.equilibrium.last.residual)


def test_independent_samples_are_asked_about_once_and_nothing_is_said(x):
    model = Net(grad="upg(k=2)").double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
        first, model.evaluations = model.evaluations, 0
        model(x)
    nfe = int(model.equilibrium.last.nfe)
    assert model.evaluations == nfe + 2
    assert first == nfe + 2 + 2


def test_leaves_of_different_lengths_are_one_system(x):
    model = Net(grad="upg(k=2)").double()
    equilibrium, counted = model.equilibrium, model.func(x)

    def func(state):
        return [counted(state[0]), 0.5 * state[1] + state[0][0, :3]]

    for _ in range(2):
        model.evaluations = 0
        equilibrium(func, [torch.zeros_like(x), x.new_zeros(3)])
        assert equilibrium.last.residual.shape == (1,)
        assert model.evaluations == int(equilibrium.last.nfe) + 2


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_samples(solver):
    equilibrium = dpp.Equilibrium(solver)
    weight = torch.ones(5, 5, requires_grad=True)
    h = equilibrium(lambda h: torch.tanh(h @ weight), torch.zeros(0, 5))
    assert h.shape == (0, 5)
    assert int(equilibrium.last.nfe) == 0


# --- other solvers, errors, warnings -------------------------------------------------------------


def test_a_solver_of_ones_own(x):
    def loop(func, h):
        assert not torch.is_grad_enabled()
        for _ in range(80):
            h = func(h)
        return h

    def own(func, h):
        return broyden(func, h, tol=1e-12)

    want = Net(grad="jfb", **TIGHT).double()(x)
    for solver in (loop, own):
        model = Net(solver, "jfb").double()
        torch.testing.assert_close(model(x), want, rtol=1e-9, atol=1e-9)
        assert model.equilibrium.last.residual.shape == (4,)
        assert (model.equilibrium.last.residual < 1e-9).all()
    with pytest.raises(ValueError, match="max_iter=9 beside a function"):
        dpp.Equilibrium(loop, max_iter=9)
    with pytest.raises(
        ValueError, match=r"(?s)returned the structure .*; expected that of the init"
    ):
        Net(lambda func, h: (h, h)).double()(x)
    with pytest.warns(dpp.ConvergenceWarning, match="above tol=1e-06 in 4 of 4"):
        Net(lambda func, h: func(h), tol=1e-6).double()(x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "newton"}, "solver='newton'; expected one of anderson, broyden, fixed_point"),
        ({"grad": "ipg"}, "unknown strategy 'ipg'"),
        ({"max_iter": 2}, "max_iter=2; expected at least 3 for anderson"),
        ({"max_iter": 0, "solver": "broyden"}, "max_iter=0; expected a whole number"),
        ({"tol": -1.0}, "tol=-1.0; expected a finite number"),
        ({"tol": "small"}, "tol='small'; expected a finite number"),
        ({"batch_dim": "rows"}, "batch_dim='rows'; expected a dimension"),
        ({"grad_in_eval": 1}, "grad_in_eval=1; expected True or False"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        dpp.Equilibrium(**settings)


def test_bad_states_are_named(x):
    model = Net().double()
    with pytest.raises(ValueError, match=r"has dtype torch\.int64"):
        model(x, torch.zeros(4, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="func's result has shape"):
        dpp.Equilibrium()(lambda h: h[:2], x)
    with pytest.raises(ValueError, match="changed its input in place"):
        dpp.Equilibrium()(lambda h: h.mul_(0.5), x)
    with pytest.raises(ValueError, match="the forward solve diverged"):
        dpp.Equilibrium(lambda func, h: h / 0)(lambda h: 0.5 * h, x)
    with pytest.warns(dpp.ConvergenceWarning, match="in 4 of 4 samples"), torch.no_grad():
        dpp.Equilibrium("fixed_point")(lambda h: h * torch.nan, x)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solve_that_stops_short_says_so_once(solver, x):
    model = Net(solver, max_iter=3, tol=1e-9).double()
    with pytest.warns(
        dpp.ConvergenceWarning, match="max_iter=3 iterations above tol=1e-09"
    ) as seen:
        model(x)
        model(x)
    assert len(seen) == 1
    model.equilibrium.tol = 0.0  # all iterations are wanted
    model(x)


def test_guard_counts_what_did_not_converge(x):
    model = Net("fixed_point", "guard('jfb', forward_tol=1e-6)", max_iter=2, tol=0.0).double()
    with pytest.warns(dpp.ConvergenceWarning, match="forward solve left"):
        model(x)
    assert dpp.failures(model)["forward"] == 4


# --- found by what finds equilibria --------------------------------------------------------------


def test_it_is_found_like_any_hosts(x, tmp_path, monkeypatch, capsys):
    model = Net(grad="schedule({0: 'jfb', 5: 'npg(k=3)'})").double()
    dpp.set_step(model, 5)
    assert model.state_dict()["equilibrium.memory.step"] == 5
    jfb, npg = Net(grad="jfb").double(), Net(grad="npg(k=3)").double()
    for twin in (jfb, npg):
        twin.load_state_dict(model.state_dict())

    def grad(net):
        return torch.autograd.grad(net(x).square().sum(), net.layer.weight)[0]

    torch.testing.assert_close(grad(model), grad(npg), rtol=0, atol=0)
    assert dpp.set_grad(model, "jfb") == 1
    torch.testing.assert_close(grad(model), grad(jfb), rtol=0, atol=0)
    log = []
    with dpp.monitor(model, lambda numbers, step: log.append((step, numbers)), every=1):
        model(x).square().sum().backward()
    ((step, numbers),) = log
    assert step == 5
    assert numbers["equilibrium/nfe"] == float(model.equilibrium.last.nfe)
    report = dpp.model_report(model, x, lambda h: h.square().sum(), ["npg"], repeats=1)
    assert [r.name for r in report.reports] == ["equilibrium"]
    pytest.importorskip("matplotlib")
    (tmp_path / "mine.py").write_text(
        "import torch, deq_phantom_plugin as dpp\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer, self.solve = torch.nn.Linear(3, 3), dpp.Equilibrium()\n"
        "    def forward(self, x):\n"
        "        return self.solve(lambda h: torch.tanh(0.3 * self.layer(h) + x), 0 * x)\n"
        "def build():\n"
        "    return Net(), torch.ones(2, 3), lambda h: h.square().sum()\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["report", "mine.py:build", "--grad", "jfb", "--repeats", "1"]) == 0
    assert "solve" in capsys.readouterr().out


def test_it_compiles_with_a_model(x):
    model = Net(grad="npg").double()

    def grad(net):
        return torch.autograd.grad(net(x).square().sum(), model.layer.weight)[0]

    want = grad(model)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(grad(compiled), want)
    assert (model.equilibrium.last.residual < 1e-3).all()


class TwoLevels(nn.Module):
    """The recursion of tiny recursive models, two states of which each sees the other, as one."""

    def __init__(self, grad):
        super().__init__()
        torch.manual_seed(0)
        self.low, self.high = nn.Linear(6, 3), nn.Linear(6, 3)
        self.equilibrium = dpp.Equilibrium("broyden", grad, **TIGHT)

    def step(self, x):
        def func(state):
            low = torch.tanh(self.low(torch.cat([state["low"] + x, state["high"]], 1)))
            return {"low": low, "high": torch.tanh(self.high(torch.cat([low, state["high"]], 1)))}

        return func

    def forward(self, x):
        return self.equilibrium(self.step(x), {"low": 0 * x, "high": 0 * x})["high"]


def test_a_recursion_of_two_levels_is_one_equilibrium():
    model = TwoLevels("ift(tol=1e-12, max_iter=200)").double()
    x = torch.randn(2, 3, dtype=torch.float64)
    parameters = list(model.parameters())
    got = torch.autograd.grad(model(x).square().sum(), parameters)
    state = {"low": 0 * x, "high": 0 * x}
    for _ in range(300):
        state = model.step(x)(state)
    want = torch.autograd.grad(state["high"].square().sum(), parameters)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


# --- hosts without an entry point ----------------------------------------------------------------


class Loop(nn.Module):
    """Somebody's module that solves by a loop."""

    def forward(self, f, h):
        with torch.no_grad():
            for _ in range(40):
                h = f(h)
        return f(h) if self.training else h


def loop_host(name="loop"):
    class LoopHost(PatchingHost):
        package = __name__
        pip = "nothing"

        def patch(self, patches):
            patches.replace(Loop, "forward", self.hook)

        def hook(self, original):
            def forward(module, f, h):
                strategy = getattr(module, "grad", None) if self.is_enabled else None
                if strategy is None or not module.training:
                    return original(module, f, h)
                with torch.no_grad():
                    for _ in range(40):
                        h = f(h)
                return attach_observed(self.observers(module), f, h, strategy, dpp.Context(), 40)

            return forward

        def is_equilibrium(self, module):
            return isinstance(module, Loop)

        def prepare_grad(self, module, spec):
            strategy = dpp.get_strategy(spec)
            return lambda: setattr(module, "grad", strategy)

    LoopHost.name = name
    return LoopHost


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(hosts, "_hosts", dict(hosts._hosts))


@pytest.mark.parametrize("as_object", [False, True])
def test_a_host_is_registered_without_a_package(registered, as_object, x):
    cls = loop_host()
    given = cls() if as_object else cls
    assert dpp.register_host(given) is given
    model, layer = Loop(), nn.Linear(5, 5).double()
    with pytest.warns(dpp.AssumptionWarning, match="host loop is not enabled, so 'exact'"):
        assert dpp.set_grad(model, "exact") == 1

    def func(h):
        return torch.tanh(0.3 * layer(h) + x)

    assert "loop" in dpp.enable("loop")
    got = torch.autograd.grad(model(func, torch.zeros_like(x)).sum(), layer.weight)
    want = torch.zeros_like(x)
    for _ in range(60):
        want = func(want)
    torch.testing.assert_close(got, torch.autograd.grad(want.sum(), layer.weight))
    assert [host.name for host, _ in find_equilibria(model)] == ["loop"]
    with pytest.raises(ValueError, match="in_eval=True: the host loop attaches in training mode"):
        dpp.set_grad(model, "jfb", in_eval=True)
    assert repr(model.grad) == "exact()"
    dpp.disable("loop")
    with pytest.raises(ValueError, match=r"unknown host 'lop' \(did you mean 'loop'"):
        dpp.enable("lop")


def test_names_of_hosts_are_taken_once(registered):
    first, second = loop_host(), loop_host()
    dpp.register_host(first)
    dpp.enable("loop")
    with pytest.raises(ValueError, match="'loop' is known already; pass replace=True"):
        dpp.register_host(second)
    dpp.register_host(second, replace=True)
    assert type(hosts._get("loop")) is second
    assert "forward" in vars(Loop)
    assert "loop" not in {name for name, host in hosts._hosts.items() if host.is_enabled}
    with pytest.raises(ValueError, match="'torchdeq' is known already"):
        dpp.register_host(loop_host("torchdeq"))


def test_what_is_no_host_is_refused(registered):
    for wrong in (Loop, Loop(), "loop", 3):
        with pytest.raises(TypeError, match="is no host; expected a subclass of"):
            dpp.register_host(wrong)
    with pytest.raises(TypeError, match=r"Host lacks disable, enable, .*observe, prepare_grad"):
        dpp.register_host(Host)
    for name in (None, "My Host", ""):
        with pytest.raises(ValueError, match=r"name=.*; expected a lower-case identifier"):
            dpp.register_host(loop_host(name))


# --- models in which nothing is found ------------------------------------------------------------


class OwnLoop(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.memory = nn.Linear(2, 2), dpp.Memory()


CALLS = [
    lambda model: dpp.set_grad(model, "npg"),
    lambda model: dpp.monitor(model, print),
    lambda model: dpp.set_step(model, 3),
]


@pytest.mark.parametrize("call", CALLS)
def test_where_nothing_is_found_it_is_said_what_would_be(call):
    with pytest.warns(UserWarning, match=r"no equilibrium found inside Linear; .*dpp\.Equilibrium"):
        call(nn.Linear(2, 2))


@pytest.mark.parametrize("call", CALLS[:2])
def test_a_memory_alone_is_told_where_names_reach(call):
    with pytest.warns(UserWarning, match=r"has a dpp\.Memory\. A solve of your own"):
        call(OwnLoop())


def test_a_memory_alone_takes_the_step_and_a_model_is_told_of_once():
    model, nothing = OwnLoop(), nn.Linear(2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dpp.set_step(model, 7)
    assert model.memory.step == 7
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for step in range(4):
            dpp.set_step(nothing, step)
    assert len(seen) == 1


def test_a_monitor_of_nothing_is_a_handle():
    with pytest.warns(UserWarning, match="Nothing is logged"):
        handle = dpp.monitor(nn.Linear(2, 2), print)
    with handle:
        pass
    handle.remove()


@pytest.mark.parametrize(
    "solver",
    [
        lambda func, h: None,
        lambda func, h: h[:2],
        lambda func, h: func(h).float(),
        lambda func, h: [func(h)],
    ],
    ids=["nothing", "shape", "dtype", "structure"],
)
def test_a_solver_that_returns_something_else_is_named(solver, x):
    with pytest.raises(ValueError, match=r"the solver .* returned .*; expected"):
        dpp.Equilibrium(solver)(lambda h: 0.5 * h + x, x)


def test_a_strategy_can_be_written_as_an_attribute(x):
    model = Net().double()
    model.equilibrium.grad = "npg(k=3)"
    assert model.equilibrium.grad == dpp.NPG(k=3)
    with pytest.raises(ValueError, match="newton"):
        model.equilibrium.grad = "newton"


@pytest.mark.parametrize("spec", ["upg", "npg", "jfb", "bptt(steps=5)"])
@pytest.mark.parametrize("solver", ["anderson", "broyden", "fixed_point"])
def test_a_gradient_of_torch_func_is_that_of_backward(solver, spec, x):
    model = Net(solver, spec, tol=1e-10, max_iter=300).double()
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params):
        return torch.func.functional_call(model, params, (x,)).square().sum()

    found = torch.func.grad(loss)(params)
    model.zero_grad()
    loss(dict(model.named_parameters())).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-5)


def test_evaluation_by_another_solve_than_was_trained_is_said_once(x):
    model = Net("broyden", "bptt(steps=2)", tol=1e-8).double()
    model(x)
    told = pytest.warns(dpp.AssumptionWarning, match=r"solves instead.*function of as many")
    with told, torch.no_grad():
        model(x)
    steps = Net(lambda func, h: func(func(h)), "bptt(steps=2)").double()
    trained = steps(x).detach()
    with torch.no_grad():
        assert torch.equal(steps(x), trained)
    enough = Net("broyden", "bptt(steps=200)", tol=1e-8).double()
    enough(x)
    with torch.no_grad():
        enough(x)


def test_a_loop_does_not_become_a_solver():
    loop = dpp.Equilibrium(steps=3)
    with pytest.raises(ValueError, match=r"steps=None: .* as a loop, and has no solver"):
        loop.steps = None
    loop.steps = 5
    assert loop.steps == 5
    solver = dpp.Equilibrium()
    solver.steps = None
    assert solver.steps is None
