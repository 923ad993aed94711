"""Threads, exceptions and interrupts: what is left afterwards is what was there before."""

from __future__ import annotations

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from test_compile import HOSTED, SPECS, Hosted, OwnLoop, gradients
from torchdeq import core, get_deq, solver
from torchdeq.utils import arg_utils

import deq_phantom_plugin as dpp
from deq_phantom_plugin.hosts import patches
from deq_phantom_plugin.hosts import registry as hosts
from deq_phantom_plugin.hosts import torchdeq as host
from deq_phantom_plugin.strategies import registry
from deq_phantom_plugin.testing import make_equilibrium

MODELS = [*((OwnLoop, spec) for spec in SPECS), *((Hosted, spec) for spec in HOSTED)]
DRAWS = "npg_rr"  # from the generator that threads share
each_model = pytest.mark.parametrize(
    ("make", "spec"), MODELS, ids=[f"{make.__name__}-{spec}" for make, spec in MODELS]
)


@pytest.fixture(autouse=True)
def switching_often():
    """Threads take turns a thousand times as often as they do."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def hooked():
    with dpp.enabled("torchdeq"):
        yield


def batches(n):
    return torch.randn(n, 5, 4, generator=torch.Generator().manual_seed(2))


def at_once(*functions):
    """Call functions in threads that start together; return their results."""
    barrier = threading.Barrier(len(functions))

    def call(function):
        barrier.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return [future.result() for future in [pool.submit(call, f) for f in functions]]


# --- threads ----------------------------------------------------------------------------------


def replica(model):
    """A copy as `nn.DataParallel` makes them: other modules, the same parameters and dicts."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, copied in copies.items():
        for name, child in module._modules.items():
            copied._modules[name] = copies.get(child)
        for name, parameter in module._parameters.items():
            copied._parameters[name] = parameter
    return copies[model]


@pytest.mark.usefixtures("hooked")
@each_model
def test_replicas_in_threads_give_the_gradient_of_the_whole(make, spec):
    model, x = make(spec), batches(3)
    torch.manual_seed(1)
    want = gradients(copy.deepcopy(model), x.flatten(0, 1))
    if spec == DRAWS:
        model.grad = dpp.get_strategy("npg")  # its own, for all threads draw at once
        for deq in filter(lambda m: isinstance(m, core.DEQSliced), model.modules()):
            dpp.set_grad(deq, "npg")
        want = gradients(copy.deepcopy(model), x.flatten(0, 1))
    model.zero_grad()

    def step(part):
        replica(model)(part).sum().backward()

    at_once(*(lambda part=part: step(part) for part in x))
    got = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert host.core.calls.by_deq == {}


@pytest.mark.usefixtures("hooked")
@pytest.mark.parametrize("make", [OwnLoop, Hosted])
def test_models_with_different_strategies_at_once(make):
    specs = [spec for spec in (HOSTED if make is Hosted else SPECS) if spec != DRAWS]
    models, (x,) = [make(spec) for spec in specs], batches(1)
    want = [gradients(make(spec), x) for spec in specs]

    def train(model):
        model.zero_grad()
        model(x).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for _ in range(3):
        got = at_once(*(lambda model=model: train(model) for model in models))
        for spec, one, other in zip(specs, got, want, strict=True):
            # From another start it ends elsewhere, within the solver's tolerance.
            rtol = 1e-2 if "warm_start" in spec else 1e-5
            torch.testing.assert_close(one, other, rtol=rtol, atol=rtol / 10)


@pytest.mark.parametrize("spec", ["upg", "ift", "npg", "reversible(steps=4)", "bptt(steps=4)"])
def test_backward_passes_of_one_graph_at_once(spec):
    problem = make_equilibrium([(2, 3)])

    def func(h):
        threading.Event().wait(1e-4)  # the others' turn
        return problem.func(h)

    loss = problem.linear_loss(dpp.attach(func, problem.state, spec))

    def backward():
        return [torch.autograd.grad(loss, problem.params, retain_graph=True) for _ in range(4)]

    want = torch.autograd.grad(loss, problem.params, retain_graph=True)
    for grads in at_once(*[backward] * 4):
        for got in grads:
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_failures_are_counted_in_threads():
    problem = make_equilibrium([(2, 3)])
    memory = dpp.Memory()
    policy = dpp.get_strategy("guard('ift')")._policy
    failed = torch.ones(1, dtype=torch.bool)

    class Slow(type(memory.failures)):
        def __getitem__(self, key):
            value = super().__getitem__(key)
            threading.Event().wait(1e-4)  # the others' turn
            return value

    memory.failures = Slow()

    def fail():
        for _ in range(20):
            policy.note("forward", failed, memory, "no")

    with pytest.warns(dpp.ConvergenceWarning):
        at_once(*[fail] * 4)
    assert memory.failures["forward"] == 80
    assert problem.state is not None


# --- enable and disable -----------------------------------------------------------------------


def torchdeq_as_it_is():
    """All of TorchDEQ that we change."""
    methods = ("__init__", "forward", "_solve_fixed_point")
    return (
        *(cls.__dict__[name] for cls in (core.DEQSliced, core.DEQIndexing) for name in methods),
        arg_utils.add_deq_args.__code__,
        tuple(vars(arg_utils.add_deq_args)),
        tuple(solver._solvers.items()),
    )


def test_enable_and_disable_from_several_threads(monkeypatch):
    dpp.disable()
    original = torchdeq_as_it_is()
    # As in a process that has not looked for hosts yet.
    for attempt in range(20):
        monkeypatch.setattr(hosts, "_hosts", {})

        def switch(attempt=attempt):
            for turn in range(4):
                if (attempt + turn) % 2:
                    dpp.enable("torchdeq")
                    deq = None
                else:
                    dpp.disable("torchdeq")
            return deq

        at_once(*[switch] * 4)
        now = torchdeq_as_it_is()
        changed = [a is not b and a != b for a, b in zip(now, original, strict=True)]
        assert all(changed) or not any(changed)
        dpp.disable("torchdeq")
        assert torchdeq_as_it_is() == original


def test_a_first_enable_in_every_thread_hooks_once(monkeypatch):
    original = torchdeq_as_it_is()
    made = []

    class Slow(host.TorchDEQ):
        def __init__(self):
            made.append(self)
            threading.Event().wait(0.01)
            super().__init__()

    load = hosts.entry_points.load
    monkeypatch.setattr(hosts, "_hosts", {})
    monkeypatch.setattr(
        hosts.entry_points, "load", lambda g, n: Slow if n == "torchdeq" else load(g, n)
    )
    at_once(*[lambda: dpp.enable("torchdeq")] * 4)
    assert len(made) == 1
    dpp.disable()
    assert torchdeq_as_it_is() == original


def _interrupt(_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("at", range(7))
def test_an_enable_that_is_interrupted_leaves_torchdeq_as_it_was(monkeypatch, at):
    dpp.disable()
    original = torchdeq_as_it_is()
    count = iter(range(100))
    raising = map(_interrupt, [None])

    def replace(self, *args, _original=patches.Patches.replace):
        if next(count) == at:
            raise KeyboardInterrupt
        _original(self, *args)

    monkeypatch.setattr(patches.Patches, "replace", replace)
    if at == 6:
        types = SimpleNamespace(FunctionType=lambda *args: next(raising))
        monkeypatch.setattr(patches, "types", types)
    with pytest.raises(KeyboardInterrupt):
        dpp.enable("torchdeq")
    assert torchdeq_as_it_is() == original
    monkeypatch.undo()
    dpp.enable("torchdeq")
    assert get_deq(grad="upg").produce_grad[0].strategy == dpp.UPG()
    dpp.disable("torchdeq")
    assert torchdeq_as_it_is() == original


@pytest.mark.parametrize("spec", ["upg", "ift", "npg", "bptt(steps=4)"])
def test_disabled_in_the_middle_of_a_forward_pass(spec):
    """Between the solves of two sampled states."""
    problem = make_equilibrium([(2, 3)])

    def run(func):
        deq = get_deq(grad=spec, n_states=2, f_max_iter=40, f_tol=1e-9)
        states, _ = deq(func, torch.zeros_like(problem.state))
        return torch.autograd.grad(sum(map(problem.linear_loss, states)), problem.params)

    def func(h):
        dpp.disable("torchdeq")
        return problem.func(h)

    with dpp.enabled("torchdeq"):
        want = run(problem.func)
    dpp.enable("torchdeq")
    if spec.startswith("bptt"):  # whose second solve TorchDEQ has done by then
        with pytest.raises(RuntimeError, match=r"Call dpp.enable\(\)"):
            run(func)
    else:
        torch.testing.assert_close(run(func), want)
    assert host.core.calls.by_deq == {}


# --- exceptions and interrupts ----------------------------------------------------------------


def surroundings():
    """What PyTorch and we keep for a thread, and that an exception could leave behind."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch._C._autograd._top_saved_tensors_default_hooks(True) is None,
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        dict(host.core.calls.by_deq),
        registry._depth.get(),
        dict(registry._defaults.get()),
    )


class Interrupt:
    """Raises at the n-th time that F is evaluated, or that a gradient passes through it."""

    def __init__(self, model, error):
        self.error, self.forward_at, self.backward_at = error, None, None
        self.evaluations = self.products = 0
        model.inner.register_forward_hook(self.evaluated)

    def evaluated(self, module, inputs, output):
        self.evaluations += 1
        if self.evaluations == self.forward_at:
            raise self.error
        if output.requires_grad:
            output.register_hook(self.passed)

    def passed(self, grad):
        self.products += 1
        if self.products == self.backward_at:
            raise self.error


def places(n):
    """The first, one in the middle, and the last."""
    return sorted({1, n // 2 + 1, n})


@pytest.mark.usefixtures("hooked")
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@each_model
def test_after_an_interrupt_training_goes_on_as_without(make, spec, error):
    x, later = batches(2)
    undisturbed = make(spec)
    counted = Interrupt(undisturbed, error)
    gradients(undisturbed, x)
    evaluations, products = counted.evaluations, counted.products
    assert products > 0
    fresh = make(spec)
    want = gradients(fresh, later)
    before = surroundings()
    for where, n in (("forward_at", evaluations), ("backward_at", products)):
        for at in places(n):
            model = make(spec)
            interrupt = Interrupt(model, error)
            setattr(interrupt, where, at)
            with pytest.raises(error):
                gradients(model, x)
            assert surroundings() == before
            setattr(interrupt, where, None)
            assert len(model.inner._forward_hooks) == 1
            assert all(not p._backward_hooks for p in model.parameters())
            rtol = 1e-3 if "warm_start" in spec else 0  # from another start, to the tolerance
            torch.testing.assert_close(gradients(model, later), want, rtol=rtol, atol=rtol / 10)


@pytest.mark.usefixtures("hooked")
@pytest.mark.parametrize("make", [OwnLoop, Hosted])
@pytest.mark.parametrize("spec", SPECS)
def test_an_interrupt_under_autocast(make, spec):
    x, later = batches(2)
    before = surroundings()
    model = make(spec)
    interrupt = Interrupt(model, KeyboardInterrupt)
    for where in ("forward_at", "backward_at"):
        interrupt.evaluations = interrupt.products = 0
        setattr(interrupt, where, 1)
        with pytest.raises(KeyboardInterrupt), torch.autocast("cpu", dtype=torch.bfloat16):
            gradients(model, x)
        setattr(interrupt, where, None)
        assert surroundings() == before
    torch.testing.assert_close(gradients(model, later), gradients(make(spec), later))
