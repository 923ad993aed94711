"""`patching.Loop` whose number of evaluations comes with each call, against the loop by hand."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import deq_phantom_plugin as dpp
from deq_phantom_plugin.patching import Equilibrium, Loop, tell_step

torch.manual_seed(0)
WEIGHT = torch.nn.Parameter(0.3 * torch.randn(4, 4, dtype=torch.float64))
Z = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
START = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
INPUTS = (WEIGHT, Z, START)


def func(h):
    return torch.tanh(h @ WEIGHT + Z)


def by_hand(steps, graph):
    h = START
    with torch.no_grad():
        for _ in range(steps - graph):
            h = func(h)
    for _ in range(graph):
        h = func(h)
    return h


def gradients(h):
    return torch.autograd.grad(h.square().sum(), INPUTS, materialize_grads=True, allow_unused=True)


def same(got, want):
    return torch.equal(got, want) and all(map(torch.equal, gradients(got), gradients(want)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("steps", "graph"), [(5, 2), (5, 5), (1, 1), (4, 1)])
def test_no_name_is_the_graph_that_the_call_asks_for(steps, graph, training):
    loop = Loop(None).train(training)
    assert loop.is_own
    assert same(loop(func, START, steps=steps, graph=graph), by_hand(steps, graph))
    assert loop.last.nfe == steps


def test_no_graph_and_no_evaluations():
    loop = Loop(None)
    found = loop(func, START, steps=3, graph=0)
    assert torch.equal(found, by_hand(3, 3))
    assert not found.requires_grad
    assert loop(func, START, steps=0, graph=2) is START


@pytest.mark.parametrize("spec", ["bptt", "schedule({0: 'bptt', 9: 'jfb'})", "tbptt('all')"])
def test_all_of_the_loop_is_all_of_each_call(spec):
    loop, switched = Loop(spec), Loop(None)
    dpp.set_grad(switched, spec)
    for one in (loop, copy.deepcopy(loop), switched):
        dpp.set_step(one, 0)
        for steps in (2, 5):
            assert same(one(func, START, steps=steps, graph=1), by_hand(steps, steps))


def test_a_number_that_is_named_stays():
    found = Loop("bptt(steps=3)")(func, START, steps=5, graph=1)
    assert same(found, by_hand(3, 3))
    loop = Loop("bptt")
    loop.grad = "bptt(steps=3)"
    assert same(loop(func, START, steps=5, graph=1), by_hand(3, 3))
    loop.grad = None
    assert same(loop(func, START, steps=5, graph=1), by_hand(5, 1))


def test_a_name_counts_in_training_alone():
    loop = Loop("tbptt(k=3)")
    assert same(loop(func, START, steps=5, graph=0), by_hand(5, 3))
    loop.eval()
    with torch.no_grad():
        found = loop(func, START, steps=5, graph=1)
    assert torch.equal(found, by_hand(5, 1))


def test_a_call_without_a_number_is_refused():
    with pytest.raises(ValueError, match="steps=None; expected the number"):
        Loop("npg")(func, START)


def numbered(i, h):
    """An evaluation that goes by its number."""
    return func(h) / (1 + i)


@pytest.mark.parametrize(("spec", "graph"), [(None, 2), ("tbptt(k=4)", 4), ("bptt", 5)])
def test_evaluations_by_their_number(spec, graph):
    h, states = START, [START]
    for i in range(5):
        with torch.set_grad_enabled(i >= 5 - graph):
            states.append(h := numbered(i, h))
    found, before = Loop(spec).numbered(numbered, START, 3, 2)
    assert same(found, h)
    assert torch.equal(before, states[-2])
    assert not before.requires_grad


@pytest.mark.filterwarnings("ignore:h is no equilibrium")  # after so few evaluations
@pytest.mark.parametrize("spec", ["npg", "ift", "jfb", "exact", "upg(k=2, lam=1.0)"])
def test_the_map_is_the_last_evaluation(spec):
    """Of a loop that is no iteration of one map: what leads there is its own, F is the last."""
    k = {"npg": 0, "upg(k=2, lam=1.0)": 2}.get(spec, 1)
    with torch.no_grad():
        h = START
        for i in range(5 - k):
            h = numbered(i, h)
    want = dpp.attach(lambda h: numbered(4, h), h, spec)
    found, before = Loop(spec).numbered(numbered, START, 3, 2)
    assert torch.allclose(found, want, rtol=1e-12)
    assert all(map(torch.allclose, gradients(found), gradients(want)))
    assert not before.requires_grad


def test_numbers_below_zero_are_none():
    assert same(Loop(None).numbered(numbered, START, -2, 1)[0], numbered(0, START))
    assert Loop("npg").numbered(numbered, START, torch.tensor([0]), -1) == (START, START)


def test_a_cache_is_refused_where_a_gradient_evaluates_again():
    for loop in (Loop(None), Loop("npg").eval()):
        loop.numbered(numbered, START, 3, 2, cache={})
    with pytest.raises(ValueError, match="a cache in training"):
        Loop("npg").numbered(numbered, START, 3, 2, cache={})
    with torch.no_grad():
        Loop("npg").numbered(numbered, START, 3, 2, cache={})


@pytest.mark.parametrize("spec", [None, "tbptt(k=2)", "npg"])
def test_a_compiled_model_runs_the_loop_as_it_is_written(spec):
    """Its length changes with every call; the block may be compiled by itself."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.loop, self.block = Loop(spec), torch.nn.Linear(4, 4).double()
            torch.nn.init.constant_(self.block.weight, 0.1)

        def forward(self, x, free):
            return self.loop.numbered(lambda i, h: torch.tanh(self.block(h)) + x, x, free, 1)[0]

    plain, compiled = Model(), Model()
    compiled.load_state_dict(plain.state_dict())
    compiled.block.compile(backend="aot_eager", dynamic=False)
    compiled.compile(backend="aot_eager", dynamic=False)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    graphs = []
    for free in range(1, 13):  # more numbers than the compiler would take
        found = [
            torch.autograd.grad(model(Z, free).square().sum(), model.block.weight)[0]
            for model in (plain, compiled)
        ]
        assert torch.allclose(*found, rtol=1e-12)
        graphs.append(counters["unique_graphs"])
    assert graphs[3] == graphs[-1]


def test_a_step_that_is_not_saved():
    """A loader that asks a checkpoint for every key finds none of the loop's."""
    model = torch.nn.ModuleDict({"loop": Loop(None, saved=False), "other": Loop(None)})
    dpp.set_step(model, 3)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert list(one.state_dict()) == ["other.memory.step"]
    model.load_state_dict({"other.memory.step": torch.tensor(5.0)})
    steps = [m.step for m in model.modules() if isinstance(m, dpp.Memory)]
    assert steps == [None, 5]  # as untold, until the script tells it


def test_a_damped_step_whose_state_changes_dtype():
    """As under autocast: the first evaluation brings the state to 16 bits."""
    half = lambda h: func(h.double()).bfloat16()  # noqa: E731
    found = Loop("upg(k=2, lam=0.5)")(half, START.float(), steps=2, graph=1)
    one = torch.lerp(START.float().bfloat16(), half(START.float()), 0.5)
    assert torch.equal(found, torch.lerp(one, half(one), 0.5))
    assert found.requires_grad


# --- an equilibrium whose model keeps its own gradient --------------------------------------------


class Own(torch.nn.Module):
    """A model that solves, and attaches a gradient of its own: ten times one step."""

    def __init__(self, grad):
        super().__init__()
        self.equilibrium = Equilibrium(grad, own="npg(k=2, lam=1.0)")
        self.weight = WEIGHT

    def forward(self, x):
        with torch.no_grad():
            h = by_hand(40, 0)

        def own():
            return h + 10 * (func(h) - func(h).detach())

        return self.equilibrium(func, h, own=own)


def test_its_own_gradient_until_one_is_named():
    model, named = Own(None), Own("jfb")
    own, other = gradients(model(None)), gradients(named(None))
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.eval()):
        assert one.equilibrium.is_own
        assert all(map(torch.equal, gradients(one(None)), own))
    model.train()
    dpp.set_grad(model, "jfb")
    assert not model.equilibrium.is_own
    assert all(map(torch.equal, gradients(model(None)), other))
    assert not all(map(torch.equal, own, other))
    dpp.set_grad(model, None)
    assert all(map(torch.equal, gradients(model(None)), own))


def test_its_own_gradient_is_seen_by_monitors_and_reports():
    model, logged = Own(None), []
    with dpp.monitor(model, lambda numbers, step: logged.append(numbers), every=1):
        model(None).sum().backward()
    assert len(logged) == 1
    report = dpp.model_report(model, None, lambda h: h.sum(), ["ift"]).reports[0]
    assert report.results[0].strategy.startswith("npg(k=2, lam=1.0")


def test_no_name_where_the_patch_left_nothing_is_refused():
    with pytest.raises(ValueError, match="grad=None; expected a spec"):
        Equilibrium(None)
    with pytest.raises(ValueError, match="grad=None; expected a spec"):
        dpp.set_grad(Equilibrium("npg"), None)


def test_the_length_of_training_is_told():
    loop = Loop("ramp('tbptt', {'k': (1, 3)}, until=0.5)")
    tell_step(loop, 5, "npg", 20)
    assert same(loop(func, START, steps=5, graph=1), by_hand(5, 2))
    tell_step(loop, 10, "npg")
    assert same(loop(func, START, steps=5, graph=1), by_hand(5, 3))
