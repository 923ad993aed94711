"""Random depth in models: one draw a step, evaluation, checkpointing, resuming, compilation."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import deq_phantom_plugin as dpp
from deq_phantom_plugin.strategies.depth import number_or_depth

WIDE = "uniform(1, 40{})"
GRADS = {  # name: spec of a number
    "tbptt": "tbptt(k={!r})",
    "upg": "upg(k={!r})",
    "npg": "npg(k={!r})",
    "bptt": "bptt(steps={!r})",
    "reversible": "reversible(steps={!r}, beta=0.3)",
    "schedule": "schedule({{0: 'jfb', 0.1: \"tbptt(k={!r})\"}})",
    "guard": 'guard("npg(k={!r})")',
    "ramp": "ramp(\"upg(k={!r})\", {{'lam': (0.2, 0.9)}}, until=5)",
}


class Net(nn.Module):
    def __init__(self, grad, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 3).double()
        self.first, self.second = (dpp.Equilibrium(grad=grad, **settings) for _ in range(2))
        self.x = torch.randn(2, 3, dtype=torch.float64)

    def solved(self, equilibrium, h):
        return equilibrium(lambda h: torch.tanh(0.5 * self.layer(h) + self.x), h)

    def forward(self, calls=1):
        h = torch.zeros_like(self.x)
        for _ in range(calls):
            h = self.solved(self.first, h.detach())
        return self.solved(self.second, h)


def number(strategy):
    """The number that was drawn."""
    strategy = getattr(strategy, "grad", strategy)  # of a guard
    return getattr(strategy, "k", None) or strategy.steps


def acted(model, *args):
    """The strategies that acted in a forward pass."""
    found = []
    for equilibrium in (model.first, model.second):
        equilibrium.observers.append((lambda solve: found.append(solve.strategy),))
    model(*args)
    model.first.observers.clear()
    model.second.observers.clear()
    return found


def gradient(model, *args):
    model.zero_grad()
    model(*args).sum().backward()
    return model.layer.weight.grad.clone()


@pytest.mark.parametrize("name", GRADS)
def test_one_draw_for_a_step_another_for_each_equilibrium(name):
    spec = GRADS[name].format(WIDE.format(""))
    model = Net(spec, steps=40)
    a, b = [], []
    dpp.set_step(model, 1, total=10)
    for step in range(1, 9):
        dpp.set_step(model, step)
        first, again, second = acted(model, 2)
        assert first == again
        assert acted(model)[0] == first  # an accumulated batch
        a.append(number(first))
        b.append(number(second))
    assert len(set(a)) > 3
    assert a != b
    twin = Net(spec, steps=40)
    twin.load_state_dict(model.state_dict())
    dpp.set_step(twin, 8, total=10)
    assert acted(twin) == acted(model)
    # The gradient is that of the number.
    dpp.set_step(model, 3)
    drawn = gradient(model)
    fixed = Net(GRADS[name].format(1), steps=40)
    dpp.set_step(fixed, 3, total=10)
    fixed.first.grad, fixed.second.grad = (GRADS[name].format(n[2]) for n in (a, b))
    assert torch.equal(drawn, gradient(fixed))


def test_each_call_for_itself():
    model = Net("tbptt(k='uniform(1, 40, per_call=True)')", steps=40)
    by_step = []
    for step in (0, 1, 0):
        dpp.set_step(model, step)
        by_step.append([strategy.k for strategy in acted(model, 6)])
    assert len(set(by_step[0])) > 3
    assert by_step[0] == by_step[2] != by_step[1]


def test_an_evaluation_and_a_report_between_two_calls_are_not_counted():
    model = Net("tbptt(k='uniform(1, 40, per_call=True)')", steps=40, grad_in_eval=True)
    dpp.set_step(model, 0)
    wanted = [acted(model), acted(model)]
    dpp.set_step(model, 1)
    dpp.set_step(model, 0)
    found = [acted(model)]
    model.eval()(3)
    model.train()
    with pytest.warns(UserWarning, match="first is left out"):
        dpp.model_report(model, (), lambda out: out.sum(), ["jfb"], repeats=1)
    assert [*found, acted(model)] == wanted


def test_calls_without_a_graph_draw_for_themselves_too():
    model = Net("tbptt(k=1)", steps="uniform(1, 40, per_call=True)")
    found = []
    for outside in (torch.no_grad, torch.enable_grad):
        dpp.set_step(model, 0)
        with outside():
            for _ in range(6):
                model()
                found.append(int(model.first.last.nfe))
        dpp.set_step(model, 1)
    assert found[:6] == found[6:]
    assert len(set(found)) > 3


def test_the_length_of_a_loop_and_its_k_are_two_draws():
    model = Net("tbptt(k='uniform(1, 40)')", steps="uniform(41, 80)")
    pairs = []
    for step in range(50):
        dpp.set_step(model, step)
        pairs.append((int(number(acted(model)[0])), int(model.first.last.nfe) - 40))
    assert sum(a == b for a, b in pairs) < 10  # 50 / 40 in the mean


def test_a_loop_of_random_length():
    model = Net("tbptt(k='all')", steps="uniform(1, 40)")
    lengths = []
    for step in range(8):
        dpp.set_step(model, step)
        model()
        lengths.append(int(model.first.last.nfe))
        assert acted(model)[0].k == lengths[-1]
    assert len(set(lengths)) > 3
    for owner in ("bptt", "reversible"):  # which takes the loop's own draw
        owning = Net(owner, steps="uniform(1, 40)")
        assert owning.first.grad == dpp.get_strategy(f"{owner}('uniform(1, 40)')")
        dpp.set_step(owning, 7)
        assert number(acted(owning)[0]) == int(owning.first.last.nfe)
    memory, evaluations = dpp.Memory(), []
    memory.tell(5, None, 0)
    context = dpp.Context(memory=memory)

    def func(h):
        evaluations.append(1)
        return torch.tanh(h)

    dpp.loop(func, torch.ones(2, 3), "poisson(8)", "tbptt(k=1)", context)
    assert len(evaluations) == number_or_depth("steps", "poisson(8)").draw(context)
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert again.first.steps == model.first.steps


# ---------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("options", ["", ", per_call=True", ", per_process=True"])
@pytest.mark.parametrize("name", GRADS)
def test_evaluation_takes_the_mean_whatever_the_step(name, options):
    spec = GRADS[name].format(WIDE.format(options))
    model = Net(spec, steps=40, grad_in_eval=True).eval()
    if name == "schedule":
        dpp.set_step(model, 9, total=10)
    fixed = Net(GRADS[name].format(20), steps=40, grad_in_eval=True).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a draw does not ask for the step
        if name == "ramp":
            dpp.set_step(model, 3)
        dpp.set_step(fixed, 9 if name == "schedule" else 3, total=10)
        wanted = gradient(fixed)
        for _ in range(2):
            assert torch.equal(gradient(model), wanted)
    if name not in ("ramp", "schedule"):
        dpp.set_step(model, 4)
        assert torch.equal(gradient(model), wanted)


class Own(nn.Module):
    """A loop of one's own."""

    def __init__(self):
        super().__init__()
        self.memory, self.evaluations = dpp.Memory(), 0

    def forward(self):
        def func(h):
            self.evaluations += 1
            return torch.tanh(h)

        context = dpp.Context(memory=self.memory)
        return dpp.loop(func, torch.ones(2, 3), "poisson(8)", "tbptt('all')", context)


def test_a_loop_in_evaluation_takes_the_mean():
    model, own = Net("tbptt(k='all')", steps="poisson(8)").eval(), Own().eval()
    for step in range(5):
        dpp.set_step(model, step)
        dpp.set_step(own, step)
        with torch.no_grad():
            model()
            own()
        assert int(model.first.last.nfe) == int(model.second.last.nfe) == 8
    assert own.evaluations == 5 * 8
    own.train()()
    assert own.evaluations != 6 * 8


# ---------------------------------------------------------------------------- checkpointing


class Straight(Net):
    """Three solves, each from the start, where a few evaluations more are seen."""

    def forward(self):
        start = torch.zeros_like(self.x, requires_grad=True)
        return sum(self.run(each, start) for each in (self.first, self.second, self.first))

    def run(self, equilibrium, h):
        return self.solved(equilibrium, h)


class Checkpointed(Straight):
    reentrant = None

    def run(self, equilibrium, h):
        return checkpoint(self.solved, equilibrium, h, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("grad", "settings"),
    [
        ("tbptt(k='uniform(1, 9)')", {"steps": "uniform(9, 20)"}),
        ("tbptt('all')", {"steps": "uniform(1, 9)"}),
        ("bptt", {"steps": "uniform(1, 9)"}),
        ("npg(k='uniform(1, 9)')", {"tol": 1e-9}),
        ("upg(k='uniform(1, 9)', lam=1.0)", {"tol": 1e-9}),
    ],
)
def test_a_recomputation_draws_the_same(grad, settings, reentrant):
    straight, checkpointed = Straight(grad, **settings), Checkpointed(grad, **settings)
    checkpointed.reentrant = reentrant
    gradients = []
    for step in range(6):
        dpp.set_step(straight, step)
        dpp.set_step(checkpointed, step)
        gradients.append(gradient(straight))
        # Reentrant: a solve and the value of `upg` begin at states that differ by the solve's tol.
        torch.testing.assert_close(gradient(checkpointed), gradients[-1], rtol=1e-6, atol=0)
    apart = [(a - b).norm() / a.norm() for a, b in itertools.combinations(gradients, 2)]
    assert max(apart) > 1e-4  # another draw is seen


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("grad", "settings"),
    [
        ("tbptt('all')", {"steps": "uniform(1, 9, per_call=True)"}),
        ("tbptt(k='uniform(1, 9, per_call=True)')", {"steps": 9}),
        ("upg(k='uniform(1, 9, per_call=True)')", {}),
    ],
)
def test_a_recomputation_of_one_call_of_many_is_refused(grad, settings, reentrant):
    model = Checkpointed(grad, **settings)
    model.reentrant = reentrant
    dpp.set_step(model, 0)
    with pytest.raises(RuntimeError, match=r"a backward pass calls again.*per_call=False"):
        gradient(model)


# ---------------------------------------------------------------------------- resuming


def trained(model, steps, total=12):
    """Train for some steps, two batches each; return what was drawn and the losses."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    found = []
    for step in steps:
        dpp.set_step(model, step, total=total)
        optimizer.zero_grad()
        numbers = [[number(strategy) for strategy in acted(model)] for _ in range(2)]
        for _ in range(2):
            loss = model().square().mean() / 2
            loss.backward()
        optimizer.step()
        assert numbers[0] == numbers[1]
        found.append((numbers[0], loss.item()))
    return found


@pytest.mark.parametrize("name", GRADS)
def test_a_resumed_run_goes_on_as_the_one_that_was_not_stopped(name):
    spec = GRADS[name].format(WIDE.format(""))
    whole = trained(Net(spec, steps=40), range(2, 10))
    stopped, resumed = Net(spec, steps=40), Net(spec, steps=40)
    first = trained(stopped, range(2, 6))
    trained(resumed, range(9, 11))  # of the same process, with another past
    resumed.load_state_dict(stopped.state_dict())
    assert resumed.first.memory.step == 5
    assert first + trained(resumed, range(6, 10)) == whole


def test_a_forward_pass_before_the_step_is_told_says_so():
    """What is loaded knows its step and not which of the equilibria it is."""
    model, twin = (Net("tbptt(k='uniform(1, 40)')", steps=40) for _ in range(2))
    dpp.set_step(model, 3)
    twin.load_state_dict(model.state_dict())
    with pytest.warns(dpp.AssumptionWarning, match="all of them draw the same"):
        twin()
    twin = pickle.loads(pickle.dumps(model))  # which knows
    assert acted(twin) == acted(model)


# ---------------------------------------------------------------------------- compilation


@pytest.mark.parametrize("options", ["", ", per_call=True"])
@pytest.mark.parametrize(
    ("grad", "settings"),
    [
        ("tbptt(k='uniform(1, 4{})')", {"steps": "uniform(4, 7{})"}),
        ("ramp('tbptt', {{'k': (1, 4)}}, until=4)", {"steps": 4}),
    ],
)
def test_a_compiled_model_draws_anew(grad, settings, options):
    filled = {k: v.format(options) if isinstance(v, str) else v for k, v in settings.items()}
    plain, written = (Net(grad.format(options), **filled) for _ in range(2))
    compiled = torch.compile(written, backend="eager")
    for step in range(6):
        dpp.set_step(plain, step)
        dpp.set_step(written, step)
        wanted = gradient(plain)
        compiled.zero_grad()
        compiled().sum().backward()
        assert torch.equal(written.layer.weight.grad, wanted)
        assert int(plain.first.last.nfe) == int(written.first.last.nfe)
