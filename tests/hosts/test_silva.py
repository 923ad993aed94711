"""silva-networks with strategies by name; runs in an environment of its own, `make test-silva`."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import deq_phantom_plugin as dpp

pytest.importorskip("silva_networks")

from silva_networks import SolverConfig, solve_equilibrium
from silva_networks.deq_engine import SILVADEQConfig, SILVADEQEngine, silva_deq

PARITY = {
    "phantom": ({"phantom_steps": 4, "phantom_tau": 0.6}, "upg(k=4, lam=0.6)"),
    "neumann": ({"neumann_terms": 6, "alpha": 0.7}, "npg(k=6, lam=0.7)"),
    "jfb": ({}, "jfb()"),
    "implicit": (
        {"backward_tol": 1e-13, "backward_max_iter": 200},
        "ift(tol=1e-13, max_iter=200)",
    ),
    "shine": ({"solver": "broyden", "history": 40}, "shine(fallback=None)"),
}


@pytest.fixture(autouse=True)
def _enabled():
    dpp.enable("silva")


class Problem:
    """A contraction with a weight and an injection."""

    def __init__(self, batch=4, size=6):
        torch.manual_seed(0)
        weight = 0.5 * torch.randn(size, size, dtype=torch.float64) / size**0.5
        self.weight = weight.requires_grad_()
        self.inject = torch.randn(batch, size, dtype=torch.float64, requires_grad=True)

    def func(self, z):
        return torch.tanh(z @ self.weight.T + self.inject)

    def gradients(self, **settings):
        config = SolverConfig(**{"max_iter": 400, "tol": 1e-14, **settings})
        tensors, start = (self.weight, self.inject), torch.zeros_like(self.inject)
        result = solve_equilibrium(
            self.func, start, config, params=tensors[:1], tensors=tensors[1:]
        )
        loss = (result.z * torch.linspace(0, 1, result.z.shape[1], dtype=torch.float64)).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, tensors)]), result


@pytest.mark.parametrize("own", list(PARITY))
def test_parity_with_the_modes_of_silva_networks(own):
    problem = Problem()
    settings, spec = PARITY[own]
    expected, theirs = problem.gradients(backward_mode=own, **settings)
    found, ours = problem.gradients(backward_mode=spec, **settings)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.z, theirs.z, rtol=1e-12, atol=1e-12)
    assert ours.iterations == theirs.iterations
    assert ours.residuals == theirs.residuals
    assert ours.info["backward_mode"].startswith(spec.partition("(")[0])


@pytest.mark.parametrize("own", list(PARITY))
def test_what_an_own_mode_amounts_to_is_what_an_observer_is_told(own):
    from deq_phantom_plugin.hosts.silva.mode import equivalent

    settings, spec = PARITY[own]
    config = SolverConfig(backward_mode=own, **settings)
    assert type(equivalent(config)) is type(dpp.get_strategy(spec))


def test_settings_of_the_config_fill_in_what_a_spec_leaves_out():
    problem = Problem()
    settings = {"phantom_steps": 3, "phantom_tau": 0.4}
    by_settings, _ = problem.gradients(backward_mode="upg", **settings)
    by_spec, _ = problem.gradients(backward_mode="upg(k=3, lam=0.4)")
    assert torch.equal(by_settings, by_spec)
    loose, result = problem.gradients(backward_mode="ift", backward_solver="picard")
    assert "fixed_point" in result.info["backward_mode"]
    exact, _ = problem.gradients(backward_mode="ift(tol=1e-13, max_iter=300)")
    torch.testing.assert_close(loose, exact, rtol=1e-2, atol=1e-3)


def test_samples_are_told_apart_only_where_the_config_says_so():
    problem = Problem()
    for dims in (0, 1):
        settings = {"solver": "anderson", "anderson_batch_dims": dims, "ridge": 1e-14}
        found, _ = problem.gradients(backward_mode="ift(tol=1e-12, max_iter=200)", **settings)
        exact, _ = problem.gradients(backward_mode="exact", **settings)
        torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-9)


def test_every_place_that_takes_a_backward_mode_takes_a_name():
    spec = "upg(k=5, lam=0.5)"
    for config in (
        SolverConfig(backward_mode=spec),
        SILVADEQConfig(backward_mode=spec).solver_config(),
        dataclasses.replace(SolverConfig(), backward_mode={"name": "upg", "k": 5}),
        SolverConfig(backward_mode=dpp.UPG(5, 0.5)),
    ):
        assert not isinstance(config.backward_mode, str) or config.backward_mode == spec
    from silva_networks.presets import SILVAGraphPresetConfig

    preset = SILVAGraphPresetConfig(backward_mode="npg(k=3)")
    assert preset.solver_config().backward_mode == "npg(k=3)"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backward_mode": "fantom"}, "backward_mode='fantom'.*silva-networks' own are unrolled"),
        ({"backward_mode": "upg(k=0)"}, "k=0"),
        ({"backward_mode": "upg", "max_iter": 0}, "max_iter must be positive"),
        ({"backward_mode": "upg", "phantom_tau": 1.5}, "lam=1.5"),
    ],
)
def test_what_cannot_be_is_refused_when_the_config_is_made(settings, message):
    with pytest.raises(ValueError, match=message):
        SolverConfig(**settings)
    dpp.disable("silva")
    if settings["backward_mode"] != "phantom" and "max_iter" not in settings:
        with pytest.raises(ValueError, match="Unknown backward_mode"):
            SolverConfig(**settings)


def test_shine_needs_broyden():
    with pytest.raises(ValueError, match="inverse-Jacobian estimate"):
        Problem().gradients(backward_mode="shine()")


@pytest.mark.parametrize("kind", [tuple, list])
def test_strategies_see_the_structure_that_users_gave(kind):
    seen = []

    def strategy(func, equilibrium, context):
        seen.append((type(equilibrium), [leaf.shape for leaf in equilibrium]))
        return dpp.get_strategy("ift(tol=1e-13, max_iter=300)").attach(func, equilibrium, context)

    weight = (0.2 * torch.randn(3, 3, dtype=torch.float64)).requires_grad_()

    def transition(state):
        a, b = state
        return kind([torch.tanh(a @ weight + 1), 0.5 * torch.tanh(b + a[:, None] @ weight)])

    start = kind([torch.zeros(2, *shape, dtype=torch.float64) for shape in ((3,), (1, 3))])
    found = []
    for mode in (strategy, "implicit"):
        config = SolverConfig(
            max_iter=300, tol=1e-14, backward_mode=mode, backward_tol=1e-13, backward_max_iter=300
        )
        state = silva_deq(transition, start, config=config, params=[weight])
        assert type(state) is kind
        found.append(torch.autograd.grad(sum(x.square().sum() for x in state), weight)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-11)
    assert seen == [(kind, [(2, 3), (2, 1, 3)])]


def test_a_solve_inside_a_solve():
    inner = SILVADEQEngine(SolverConfig(max_iter=60, tol=1e-13, backward_mode="jfb()"))
    outer = SILVADEQEngine(SolverConfig(max_iter=60, tol=1e-13, backward_mode="jfb()"))
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def transition(state):
        a, b = state
        c = inner(lambda c: 0.5 * torch.tanh(c) + weight * a, torch.zeros_like(a), params=[weight])
        return (0.4 * torch.tanh(c) + 1, 0.5 * b + a)

    start = (torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64))
    a, b = outer(transition, start, params=[weight])
    (a.sum() + b.sum()).backward()
    assert torch.isfinite(weight.grad)
    assert weight.grad != 0


def test_a_layer_of_silva_networks_switches():
    from silva_networks.layers import DEQLayer

    torch.manual_seed(0)
    body = nn.Linear(4, 4).double()
    config = SolverConfig(max_iter=100, tol=1e-12, alpha=0.5, backward_mode="upg(k=5, lam=0.5)")
    layer = DEQLayer(lambda z, x: torch.tanh(0.5 * body(z) + x), config)
    x = torch.randn(3, 4, dtype=torch.float64)

    def gradient():
        body.zero_grad()
        layer(torch.zeros_like(x), x).square().sum().backward()
        return body.weight.grad.clone()

    named = gradient()
    assert dpp.set_grad(layer, "phantom") == 1
    assert layer.config.backward_mode == "phantom"
    # One undamped step is silva-networks' default.
    assert not torch.allclose(gradient(), named)
    assert dpp.set_grad(layer, "jfb()") == 1
    jfb = gradient()
    assert dpp.set_grad(layer, "phantom") == 1
    torch.testing.assert_close(gradient(), jfb)


def test_a_layer_that_makes_configs_of_its_own_keeps_memory_and_observers():
    from deq_phantom_plugin.hosts import find_equilibria

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 4).double()
            self.config = SolverConfig(max_iter=100, tol=1e-12, backward_mode="jfb()")

        def forward(self, x):
            config = dataclasses.replace(self.config, reengage=False)
            func = lambda z: torch.tanh(0.5 * self.body(z) + x)  # noqa: E731
            params = tuple(self.body.parameters())
            return solve_equilibrium(func, torch.zeros_like(x), config, params=params).z

    torch.manual_seed(0)
    layer, x, seen = Layer(), torch.randn(3, 4, dtype=torch.float64), []

    def gradient():
        layer.zero_grad()
        layer(x).square().sum().backward()
        return layer.body.weight.grad.clone()

    jfb = gradient()
    dpp.set_grad(layer, "exact")
    exact = gradient()
    dpp.set_grad(layer, "schedule({0: 'jfb', 5: 'exact'})")
    dpp.set_step(layer, 4)
    assert torch.equal(gradient(), jfb)
    dpp.set_step(layer, 5)
    assert torch.equal(gradient(), exact)
    ((host, module),) = find_equilibria(layer)
    end = host.observe(module, seen.append)
    gradient()
    dpp.set_grad(layer, "phantom")
    gradient()
    end()
    assert [type(solve.strategy) for solve in seen] == [dpp.Exact, dpp.UPG]


def test_while_the_host_only_observes_names_mean_nothing():
    problem = Problem()
    config = SolverConfig(max_iter=400, tol=1e-14, backward_mode="upg(k=1, lam=1.0)")
    dpp.disable("silva")

    def gradient():
        tensors, start = (problem.weight, problem.inject), torch.zeros_like(problem.inject)
        z = solve_equilibrium(
            problem.func, start, config, params=tensors[:1], tensors=tensors[1:]
        ).z
        return torch.autograd.grad(z.sum(), problem.weight)[0]

    before = gradient()  # silva-networks takes unknown modes for implicit
    other = SILVADEQEngine(SolverConfig())
    from deq_phantom_plugin.hosts import registry as hosts

    end = hosts._get("silva").observe(other, lambda solve: None)
    torch.testing.assert_close(gradient(), before)
    end()
    torch.testing.assert_close(gradient(), before)
    dpp.enable("silva")
    assert not torch.allclose(gradient(), before, rtol=1e-3)
