"""Which entry of `grad` each state has that DEQIndexing hands out, some of them missing."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import deq_phantom_plugin as dpp
from deq_phantom_plugin.contract.errors import AssumptionWarning
from deq_phantom_plugin.hosts import find_equilibria

torchdeq = pytest.importorskip("torchdeq")

SOLVERS = ["fixed_point_iter", "fixed_point_fast", "anderson", "anderson_fast"]
SOLVERS += ["broyden", "broyden_fast", "simple_fixed_point_iter"]
ALIKE = pytest.mark.filterwarnings("ignore:indexing=.*:RuntimeWarning")
pytestmark = pytest.mark.filterwarnings("ignore:the solver of a DEQIndexing stopped early")


@pytest.fixture(autouse=True)
def _enabled():
    with dpp.enabled("torchdeq"):
        yield


class Affine(nn.Module):
    """h -> h W^T + x with ||W|| = 0.6, whose iterates and gradients are known in closed form."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(5, 5, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(0.6 * weight / torch.linalg.matrix_norm(weight, 2))
        self.x = torch.randn(3, 5, generator=generator, dtype=torch.float64)

    def forward(self, h):
        return h @ self.weight.mT + self.x

    def start(self):
        return torch.zeros_like(self.x)


class Spies:
    """Strategies that write down, by name, which equilibria they were given and which memory."""

    def __init__(self, n: int) -> None:
        self.seen = []
        self.grad = [self.spy(i) for i in range(n)]

    def spy(self, i):
        def attach(func, equilibrium, context):
            self.seen.append((i, equilibrium.clone(), context.memory))
            return func(equilibrium)

        return attach


def gradient(layer, state):
    return torch.autograd.grad(state.sin().sum(), layer.weight, retain_graph=True)[0]


# --- a model of what should happen ------------------------------------------------------------


def iterate(layer, limit, tol):
    """The states of a fixed-point iteration, by step; it stops where all samples are good."""
    state, states = layer.start(), {}
    for step in range(1, limit + 1):
        image = layer(state).detach()
        states[step] = image
        if float((image - state).norm(dim=1).max()) < tol:
            break
        state = image
    return states


def expected(indexing, limit, states):
    """(entry, state) of each state that is handed out, in order."""
    asked = [*indexing, limit]
    steps = [step for step in states if step in asked] or [max(states)]
    return [(asked.index(s), states[s]) for s in steps[:-1]] + [(len(indexing), states[steps[-1]])]


def closed_form(layer, kind, h, tau):
    """(value, gradient) of one entry at h, by plain autograd and by a dense inverse."""
    if kind == "exact":  # the rows of the state are the transposes of what J = W acts on
        value = layer(h).detach()
        v = value.cos() @ torch.linalg.inv(torch.eye(5, dtype=h.dtype) - layer.weight.detach())
        return value, v.mT @ h
    steps, lam = (kind, tau) if isinstance(kind, int) else (4, 0.7)
    out = h
    for _ in range(steps):
        out = (1 - lam) * out + lam * layer(out)
    return out.detach(), gradient(layer, out)


KINDS = [1, 2, 3, "exact", "upg(k=4, lam=0.7)"]


@pytest.mark.filterwarnings("ignore:h is no equilibrium")
@ALIKE
@settings(max_examples=150, deadline=None)
@given(
    indexing=st.lists(st.integers(1, 40), max_size=4),
    kinds=st.lists(st.sampled_from(KINDS), min_size=5, max_size=5),
    limit=st.integers(1, 40),
    tol=st.sampled_from([0.0, 1e-9, 1e-4, 1e-1]),
    solver=st.sampled_from(SOLVERS[:2]),
    seed=st.integers(0, 5),
    switched=st.booleans(),
)
def test_each_state_has_the_gradient_of_its_entry(
    indexing, kinds, limit, tol, solver, seed, switched
):
    grad = kinds[: len(indexing) + 1]
    if all(isinstance(kind, int) for kind in grad):
        grad[-1] = "exact"
    layer = Affine(seed)
    at_first = "jfb" if switched else grad
    common = {"core": "indexing", "f_solver": solver, "f_max_iter": limit, "f_tol": tol}
    deq = torchdeq.get_deq(grad=at_first, indexing=indexing, tau=0.8, **common)
    if switched:
        assert dpp.set_grad(deq, grad) == 1
    states, _ = deq(layer, layer.start())
    want = expected(indexing, limit, iterate(layer, limit, tol))
    assert len(states) == len(want)
    for got, (entry, h) in zip(states, want, strict=True):
        value, g = closed_form(layer, grad[entry], h, tau=0.8)
        torch.testing.assert_close(got.detach(), value, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(gradient(layer, got), g, rtol=1e-8, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(
    indexing=st.lists(st.integers(1, 40), max_size=4),
    steps=st.lists(st.integers(1, 4), min_size=5, max_size=5),
    limit=st.integers(1, 40),
    tol=st.sampled_from([0.0, 1e-4, 1e-1]),
    solver=st.sampled_from(["fixed_point_iter", "anderson", "broyden"]),
)
def test_lists_of_integers_are_torchdeqs_bit_for_bit(indexing, steps, limit, tol, solver):
    layer, grad = Affine(), steps[: len(indexing) + 1]
    common = {"core": "indexing", "f_solver": solver, "f_max_iter": limit, "f_tol": tol}

    def outcome():
        deq = torchdeq.get_deq(grad=grad, indexing=indexing, tau=0.8, **common)
        states, _ = deq(layer, layer.start())
        return [t for state in states for t in (state, gradient(layer, state))]

    ours = outcome()
    dpp.disable("torchdeq")
    theirs = outcome()
    dpp.enable("torchdeq")
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.filterwarnings("ignore:h is no equilibrium")
@ALIKE
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("tol", [0.0, 1e-6])
@pytest.mark.parametrize("limit", [8, 20, 60])
@pytest.mark.parametrize(
    "indexing", [[], [1, 2, 5], [1, 7, 9], [5, 5, 9], [4, 8, 20], [9, 4], [3, 70], [40, 50]]
)
def test_every_solver(solver, tol, limit, indexing):
    """A state is that which the solver hands out when it is asked for that step alone."""
    layer, asked = Affine(), [*indexing, limit]
    spies = Spies(len(asked))
    common = {"core": "indexing", "f_solver": solver, "f_max_iter": limit, "f_tol": tol}
    deq = torchdeq.get_deq(grad=spies.grad, indexing=indexing, **common)
    deq(layer, layer.start())

    def at(steps):
        wrapped = torchdeq.core.deq_decorator(layer, layer.start(), no_stat=deq.no_stat)[0]
        with torch.no_grad():
            found = deq.f_solver(
                wrapped, x0=layer.start(), max_iter=limit, tol=tol, stop_mode="abs", indexing=steps
            )
        return found[:2]

    # One step that no solve takes: what comes back then is the end of the solve.
    final, _ = at([limit + 2])
    alone = {step: at([step, limit + 2])[1] for step in sorted(set(asked))}
    numbers = [number for number, _, _ in spies.seen]
    assert numbers[-1] == len(indexing)
    for number, equilibrium, _ in spies.seen[:-1]:
        assert torch.equal(equilibrium, alone[asked[number]][0])
    last = spies.seen[-1][1]
    assert torch.equal(last, final) or any(torch.equal(last, s[0]) for s in alone.values() if s)
    assert spies.seen[-1][2] is deq.grad_memory[-1]
    assert all(memory is deq.grad_memory[number] for number, _, memory in spies.seen)


# --- where a call differs from the construction ------------------------------------------------


@pytest.mark.filterwarnings("ignore:h is no equilibrium")
@pytest.mark.parametrize("n_states", [2, 4])
@pytest.mark.parametrize("built", [3, 12, 30])
@pytest.mark.parametrize("called", [1, 2, 3, 7, 12, 30])
@pytest.mark.parametrize("core", ["indexing", "sliced"])
def test_a_limit_of_the_call(n_states, built, called, core):
    layer = Affine()
    common = {"core": core, "n_states": n_states, "f_max_iter": built, "f_tol": 0.0}
    n = len(torchdeq.get_deq(**common).indexing)
    spies = Spies(n)
    deq = torchdeq.get_deq(grad=spies.grad, **common)
    states, _ = deq(layer, layer.start(), solver_kwargs={"f_max_iter": called})
    numbers = [number for number, _, _ in spies.seen]
    assert len(states) == len(numbers)
    assert numbers[-1] == n - 1
    assert numbers == sorted(set(numbers))
    if core == "sliced":  # a solve for each: none is ever missing
        assert numbers == list(range(n))


@pytest.mark.parametrize("core", ["indexing", "sliced"])
def test_eval_mode_is_the_equilibrium_alone(core):
    layer = Affine()
    common = {"core": core, "f_tol": 1e-12, "f_max_iter": 80}
    grad = ["jfb", 2, "upg(k=3)"]
    deq = torchdeq.get_deq(grad=grad, indexing=[3, 70], **common).eval()
    with torch.no_grad():
        (state,), _ = deq(layer, layer.start())
    inverse = torch.linalg.inv(torch.eye(5, dtype=torch.float64) - layer.weight.detach().mT)
    torch.testing.assert_close(state, layer.x @ inverse, rtol=1e-9, atol=1e-10)


# --- what is said --------------------------------------------------------------------------------


def test_an_indexing_out_of_order_is_said():
    layer = Affine()
    common = {"core": "indexing", "indexing": [9, 4], "f_tol": 0.0}
    with pytest.warns(AssumptionWarning, match=r"indexing=\[9, 4\] is not in ascending order"):
        torchdeq.get_deq(grad=["jfb", 2, "upg"], **common)(layer, layer.start())


@pytest.mark.parametrize("grad", ["jfb", ["jfb"] * 3, [1, 2, 3]])
def test_where_the_order_does_not_matter_nothing_is_said(grad, recwarn):
    layer = Affine()
    settings = {"core": "indexing", "indexing": [9, 4], "f_tol": 0.0}
    torchdeq.get_deq(grad=grad, **settings)(layer, layer.start())
    assert not list(recwarn)


@pytest.mark.parametrize(
    ("core", "grad", "said"),
    [("indexing", ["jfb", "upg"], True), ("indexing", "upg", False), ("sliced", ["jfb", 2], False)],
)
def test_a_host_that_is_not_enabled_is_said_where_it_matters(core, grad, said, recwarn):
    layer = Affine()
    deq = torchdeq.get_deq(core=core, grad=grad, n_states=2)
    dpp.disable("torchdeq")
    deq(layer, layer.start())
    assert ["dpp.enable()" in str(w.message) for w in recwarn] == [True] * said


# --- observation ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grad", "options", "name"),
    [
        (["jfb", 2, "upg(k=4)"], {"indexing": [20, 90]}, "upg(k=4, lam=0.5, checkpoint=False)"),
        (["jfb", "npg", 3], {"indexing": [60, 90]}, "torchdeq(grad=3, tau=1.0)"),
        ([2, "jfb", "upg(k=4)"], {"indexing": [2, 90], "sup_gap": 2}, "upg(k=4, "),
        (["upg(k=4)", "jfb"], {"indexing": [2], "sup_gap": 2, "f_max_iter": 9}, "upg(k=4, "),
        ([4, 2, 3], {"indexing": [4, 9]}, "torchdeq(grad=2, "),  # TorchDEQ's own pairing
        ([4, 1], {"indexing": [4], "sup_gap": 2}, "torchdeq(grad=4, "),
        ([4, 2, 3], {"indexing": [4, 9], "sup_loc": [1, 3, 9]}, "torchdeq(grad=2, "),
        (["jfb", 4], {"n_states": 2, "core": "sliced"}, "torchdeq(grad=4, "),
        ([4, 1], {"n_states": 2, "core": "sliced", "sup_gap": 2}, "torchdeq(grad=4, "),
    ],
)
def test_the_observed_strategy_is_that_of_the_last_state(grad, options, name):
    layer = Affine()
    deq = torchdeq.get_deq(**{"core": "indexing", "f_max_iter": 99, "f_tol": 1e-6, **options})
    dpp.set_grad(deq, grad)
    seen = []
    host, found = find_equilibria(deq)[0]
    end = host.observe(found, seen.append)
    states, _ = deq(layer, layer.start())
    (solve,) = seen
    assert repr(solve.strategy).startswith(name)
    assert torch.equal(solve.attached, states[-1])
    if options.get("core") != "sliced":
        # What the solver says of its own end is not said of a state from before it.
        image = layer(states[-1])
        residual = (image - states[-1]).norm(dim=1) / image.norm(dim=1)
        torch.testing.assert_close(solve.residual, residual.detach())
    end()


def test_an_observer_of_no_states_is_not_called():
    layer, seen = Affine(), []
    deq = torchdeq.get_deq(core="indexing", grad=1, sup_gap=2)
    host, found = find_equilibria(deq)[0]
    host.observe(found, seen.append)
    assert deq(layer, layer.start())[0] == []
    assert seen == []


# --- models --------------------------------------------------------------------------------------


def test_lists_with_integers_are_copied_and_pickled():
    layer = Affine()
    deq = torchdeq.get_deq(core="indexing", grad=["jfb", 3, "upg"], indexing=[4, 90], f_max_iter=99)
    want = [gradient(layer, state) for state in deq(layer, layer.start())[0]]
    for other in [copy.deepcopy(deq), pickle.loads(pickle.dumps(deq))]:
        got = [gradient(layer, state) for state in other(layer, layer.start())[0]]
        assert all(itertools.starmap(torch.equal, zip(got, want, strict=True)))
