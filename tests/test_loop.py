"""Loops of a fixed number of evaluations, against the same loop written out by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian
from torch.nn.utils import parametrize

import deq_phantom_plugin as dpp
from deq_phantom_plugin.hosts import find_equilibria
from deq_phantom_plugin.patching import Loop

STEPS = 6


class Recursive(nn.Module):
    """A pair of states, answer and latents, whose first ones are learned vectors."""

    def __init__(self, grad="tbptt", steps=STEPS, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.first = nn.ParameterList([nn.Parameter(torch.randn(4)) for _ in range(2)])
        self.equilibrium = dpp.Equilibrium(grad=grad, steps=steps, **settings)
        self.double()

    def func(self, x):
        def func(state):
            answer, latent = state["answer"], state["latent"]
            both = torch.cat([answer.expand_as(x), (latent + x)], dim=-1)
            new = self.norm(both + torch.tanh(self.mix(both)))
            return {"answer": new[..., :4], "latent": new[..., 4:]}

        return func

    def start(self):
        return {"answer": self.first[0], "latent": self.first[1]}

    def forward(self, x):
        return self.equilibrium(self.func(x), self.start())

    def by_hand(self, x, k, steps=STEPS):
        """The last k evaluations carry the graph; the first state's goes on where all do."""
        func, state = self.func(x), self.start()
        with torch.no_grad():
            for _ in range(steps - k):
                state = func(state)
        for _ in range(k):
            state = func(state)
        return state


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(2, 3, 4, dtype=torch.float64)


def gradients(model, state):
    loss = state["answer"].square().sum() + state["latent"][..., 0].sum()
    return torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


PLAIN = [
    ("tbptt", 1),
    ("jfb", 1),
    ("tbptt(k=2)", 2),
    ("upg(k=2, lam=1.0)", 2),
    ("schedule({0: 'tbptt(3)', 9: 'npg'})", 3),
    ("tbptt(k='all')", STEPS),
    ("tbptt(k=50)", STEPS),
    ("upg(k=50, lam=1.0)", STEPS),
    ("bptt", STEPS),
]


@pytest.mark.parametrize(("spec", "k"), PLAIN)
def test_the_plain_loop_bit_for_bit(spec, k, x):
    model = Recursive(spec)
    dpp.set_step(model, 0)
    context = dpp.Context(step=0)
    for run in (
        lambda: model(x),
        lambda: dpp.loop(model.func(x), model.start(), STEPS, spec, context),
    ):
        state, want = run(), model.by_hand(x, k)
        assert all(torch.equal(state[name], want[name]) for name in want)
        assert_same(gradients(model, state), gradients(model, want))


def test_the_first_state_has_a_gradient_where_all_evaluations_have_a_graph(x):
    for spec, reached in (("bptt", True), ("tbptt('all')", True), ("tbptt(5)", False)):
        model = Recursive(spec)
        *_, first, second = gradients(model, model(x))
        assert (first is not None) == (second is not None) == reached


@pytest.mark.parametrize("spec", ["ift(tol=1e-12)", "exact", "npg(k=300, lam=0.5)"])
def test_implicit_gradients_against_dense_jacobians(spec):
    torch.manual_seed(0)
    weight = (0.1 * torch.randn(3, 3, dtype=torch.float64)).requires_grad_()
    inject = torch.randn(3, dtype=torch.float64, requires_grad=True)
    func = lambda h: torch.tanh(h @ weight.T + inject)  # noqa: E731
    v = torch.randn(3, dtype=torch.float64)
    # Where F is linearised: at the value for npg, one evaluation before it for the others.
    at = torch.zeros(3, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(4 if spec.startswith("npg") else 3):
            at = func(at)
    g = torch.linalg.solve(torch.eye(3, dtype=torch.float64) - jacobian(func, at).T, v)
    want = torch.autograd.grad(func(at) @ g, [weight, inject])
    context = dpp.Context(batch_dim=None)
    state = dpp.loop(func, torch.zeros(3, dtype=torch.float64), 4, spec, context)
    got = torch.autograd.grad(state @ v, [weight, inject])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("spec", ["npg", "npg_rr", "ift", "tbptt(2)", "guard('jfb')"])
@pytest.mark.filterwarnings("ignore::deq_phantom_plugin.ConvergenceWarning")
def test_the_value_is_that_of_the_plain_loop(spec, x):
    model = Recursive()
    want = model.by_hand(x, 0)
    state = dpp.loop(model.func(x), model.start(), STEPS, spec, dpp.Context(batch_dim=0))
    assert all(torch.equal(state[name], want[name]) for name in want)


def test_damped_evaluations_come_last(x):
    model = Recursive()
    state = model.by_hand(x, 0, STEPS - 2)
    for _ in range(2):
        image = model.func(x)(state)
        state = {name: torch.lerp(state[name], image[name], 0.7) for name in state}
    got = dpp.loop(model.func(x), model.start(), STEPS, "upg(k=2, lam=0.7)")
    assert all(torch.equal(got[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("spec", "evaluations"),
    [
        ("tbptt(2)", STEPS),
        ("bptt", STEPS),
        ("bptt(steps=3)", 3),
        ("npg", STEPS + 1),
        ("jfb", STEPS),
    ],
)
def test_evaluations(spec, evaluations, x):
    model, calls = Recursive(), []
    func = model.func(x)

    def counted(state):
        calls.append(torch.is_grad_enabled())
        return func(state)

    dpp.loop(counted, model.start(), STEPS, spec)
    assert len(calls) == evaluations
    calls.clear()
    with torch.no_grad():
        state = dpp.loop(counted, model.start(), STEPS, spec)
    assert len(calls) == STEPS
    want = model.by_hand(x, 0)
    assert all(torch.equal(state[name], want[name]) for name in want)


def saved(run):
    """How many tensors autograd holds on to."""
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        run()
    return len(seen)


@pytest.mark.filterwarnings("ignore::deq_phantom_plugin.ConvergenceWarning")
def test_memory_grows_with_k_alone(x):
    model = Recursive()

    def held(spec, steps):
        context = dpp.Context(batch_dim=0)
        return saved(lambda: dpp.loop(model.func(x), model.start(), steps, spec, context))

    for spec in ("tbptt(2)", "npg", "ift", "jfb"):
        assert held(spec, 4) == held(spec, 64)
    assert held("tbptt(4)", 64) > held("tbptt(2)", 64) > held("tbptt(1)", 64)
    assert held("npg(k=9)", 8) == held("npg(k=2)", 8)


@pytest.mark.parametrize("as_module", [False, True])
@pytest.mark.parametrize("spec", ["tbptt(2)", "tbptt('all')", "upg(k=2, lam=0.5)", "jfb", "bptt"])
def test_one_graph_for_the_compiler(spec, as_module, x):
    """Of which the first state's vectors, the parameters and x are inputs."""
    model, strategy = Recursive(spec), dpp.get_strategy(spec, {"steps": STEPS})

    def run():
        state = model(x) if as_module else dpp.loop(model.func(x), model.start(), STEPS, strategy)
        return state["answer"].square().sum() + state["latent"].sum()

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)()
    parameters = [*model.parameters()]
    got = torch.autograd.grad(compiled, parameters, allow_unused=True)
    want = torch.autograd.grad(run(), parameters, allow_unused=True)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("spec", "k"), [("tbptt(2)", 2), ("tbptt('all')", STEPS), ("bptt", STEPS)])
def test_the_plain_loop_under_autocast_bit_for_bit(spec, k, x):
    """Weights are cast once for all evaluations with a graph: the sum of gradients is rounded."""
    model, x = Recursive(spec).float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        want = gradients(model, model.by_hand(x, k))
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(model, model(x))
    assert_same(got, want)


class Halved(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return 0.5 * weight


# --- as a module ----------------------------------------------------------------------------------


def test_a_module_is_found_switched_and_observed(x):
    model, solves = Recursive(), []
    ((host, module),) = find_equilibria(model)
    host.observe(module, solves.append)
    assert dpp.set_grad(model, "tbptt(3)") == 1
    state = model(x)
    assert_same(gradients(model, state), gradients(model, model.by_hand(x, 3)))
    (solve,) = solves
    assert (solve.nfe, repr(solve.strategy)) == (STEPS, "tbptt(k=3)")
    assert torch.equal(solve.equilibrium["answer"], state["answer"])
    assert model.equilibrium.last.residual is None
    assert int(model.equilibrium.last.nfe) == STEPS


@pytest.mark.parametrize("spec", ["tbptt", "tbptt(2)", "tbptt('all')", "bptt", "upg(k=50)"])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_weights_that_an_evaluation_without_a_graph_has_left_behind(spec, one_by_one):
    torch.manual_seed(0)
    layer = parametrize.register_parametrization(nn.Linear(3, 3).double(), "weight", Halved())
    start = torch.randn(2, 3, dtype=torch.float64)
    func = lambda h: torch.tanh(layer(h))  # noqa: E731
    at = (lambda i, h: func(h)) if one_by_one else None
    module = Loop(spec, STEPS)

    def gradient():
        with torch.no_grad():
            module(func, start, at)
        return torch.autograd.grad(module(func, start, at).sum(), [*layer.parameters()])

    want = gradient()
    with parametrize.cached():
        got = gradient()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_evaluation_mode_is_the_plain_loop_without_a_graph(x):
    model = Recursive("npg").eval()
    with torch.no_grad():
        state = model(x)
    want = model.by_hand(x, 0)
    assert all(torch.equal(state[name], want[name]) for name in want)
    assert not state["answer"].requires_grad
    with pytest.warns(dpp.AssumptionWarning, match="in evaluation mode"):
        again = model(x)
    assert all(torch.equal(again[name], want[name]) for name in want)
    assert not again["answer"].requires_grad


def test_a_copy_and_an_old_pickle(x):
    model = Recursive("tbptt(2)")
    again = copy.deepcopy(model)
    assert_same(gradients(again, again(x)), gradients(model, model(x)))
    old = {name: value for name, value in vars(dpp.Equilibrium()).items() if name != "steps"}
    restored = dpp.Equilibrium.__new__(dpp.Equilibrium)
    restored.__setstate__(old)
    assert restored.steps is None


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "3", None])
def test_steps_that_are_none(steps):
    with pytest.raises(ValueError, match=r"steps=.*expected a whole number of at least 1"):
        dpp.loop(torch.tanh, torch.zeros(3), steps)
    if steps is not None:
        with pytest.raises(ValueError, match=r"steps=.*expected a whole number of at least 1"):
            dpp.Equilibrium(steps=steps)
        equilibrium = dpp.Equilibrium(steps=3)
        with pytest.raises(ValueError, match=r"steps=.*expected a whole number of at least 1"):
            equilibrium.steps = steps


@pytest.mark.parametrize("settings", [{"max_iter": 5}, {"tol": 0.1}, {"solver": "broyden"}])
def test_a_loop_has_no_solver(settings):
    with pytest.raises(ValueError, match="steps=3 beside solver="):
        dpp.Equilibrium(steps=3, **settings)


@pytest.mark.parametrize("k", [0, 1.5, "every", True])
def test_a_k_that_is_none(k):
    with pytest.raises(ValueError, match=r"k=.*expected a whole number of at least 1.*, or 'all'"):
        dpp.get_strategy({"name": "tbptt", "k": k})


def test_all_of_a_loop_where_there_is_none():
    with pytest.raises(ValueError, match=r"tbptt\(k='all'\) goes through all .* no loop"):
        dpp.attach(torch.tanh, torch.zeros(3), "tbptt('all')")


def test_a_map_that_changes_shape_later():
    grows = lambda h: torch.cat([h, h])  # noqa: E731
    with pytest.raises(ValueError, match=r"shape \(6,\), to which the state's \(3,\) does not"):
        dpp.loop(grows, torch.zeros(3), 2)
    shapes = iter([(2, 3), (4, 2, 3)])
    with pytest.raises(ValueError, match=r"shape \(4, 2, 3\), but the state has \(2, 3\)"):
        dpp.loop(lambda h: h.expand(next(shapes)), torch.zeros(3), 3)
    with pytest.raises(ValueError, match="returned the structure"):
        dpp.loop(lambda h: (h, h), torch.zeros(3), 3)
    with pytest.raises(ValueError, match="is a float; expected a tensor"):
        dpp.loop(lambda h: 1.0, torch.zeros(3), 3)


@pytest.mark.parametrize("spec", ["tbptt", "tbptt('all')", "npg"])
def test_a_first_state_that_is_none(spec):
    with pytest.raises(ValueError, match="the state holds a NoneType; expected a tensor"):
        dpp.loop(lambda state: state, (torch.zeros(3), None), 3, spec)


def test_a_first_state_that_grows_under_a_strategy_that_cannot():
    with pytest.raises(ValueError, match=r"shape \(2, 3\), but the state has \(3,\)"):
        dpp.loop(lambda h: torch.tanh(h).expand(2, 3), torch.zeros(3), 3, "reversible(steps=3)")


def test_what_is_no_context():
    with pytest.raises(TypeError, match=r"expected a dpp\.Context"):
        dpp.loop(torch.tanh, torch.zeros(3), 3, context={"step": 1})


class Longer(dpp.GradStrategy):
    """Of another package: it does not know of loops."""

    @property
    def steps_ahead(self):
        return 4

    def attach(self, func, equilibrium, context):
        for _ in range(4):
            equilibrium = func(equilibrium)
        return equilibrium


@pytest.mark.filterwarnings("ignore:h is no equilibrium")
def test_a_strategy_that_is_longer_than_the_loop():
    with pytest.raises(ValueError, match=r"Longer\(\) evaluates F 4 times, in a loop of steps=3"):
        dpp.loop(torch.tanh, torch.ones(3), 3, Longer())
    start = torch.ones(3)
    want = start.tanh().tanh().tanh().tanh()
    assert torch.equal(dpp.loop(torch.tanh, start, 4, Longer()), want)
