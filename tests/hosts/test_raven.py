"""Raven as remote code loads it, on a small model of the same seam (the real one: `-m hosts`).

References are its own code: a caller may say how many evaluations have a graph.
"""

from __future__ import annotations

import importlib
import sys
import types
import warnings

import pytest
import torch

import deq_phantom_plugin as dpp
from conftest import ROOT
from deq_phantom_plugin.hosts import raven

pytest.importorskip("transformers", reason="the host is of its models")

IDS = torch.arange(8).view(2, 4) % 5
FOLDER = ROOT / "tests" / "repositories" / "huginn" / "recpre"


@pytest.fixture
def module(monkeypatch):
    """The module of a model that was loaded, under a name that nobody knows before."""
    package = types.ModuleType("remote_raven")
    package.__path__ = [str(FOLDER)]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, package.__name__, package)
        for name in ("raven_config_minimal", "raven_modeling_minimal"):
            patch.delitem(sys.modules, f"remote_raven.{name}", raising=False)
        loaded = importlib.import_module("remote_raven.raven_modeling_minimal")
        patch.setattr(raven, "KNOWN", (raven._version(loaded.RavenForCausalLM),))
        yield loaded
        dpp.disable("raven")
    for name in [name for name in sys.modules if name.startswith("remote_raven.")]:
        del sys.modules[name]


@pytest.fixture
def model(module):
    torch.manual_seed(0)
    return module.RavenForCausalLM(module.RavenConfig()).double().train()


def trained(model, pair=(3, 2), cache=None):
    """The loss, its gradients, what the model monitors, and the random state after it."""
    torch.manual_seed(1)
    model.zero_grad()
    loss = model(IDS, IDS.roll(1, 1), pair, cache)["loss"]
    if loss.requires_grad:
        loss.backward()
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [loss.detach(), *grads, torch.get_rng_state()], model.latest_metrics


def same(got, want):
    return got[1] == want[1] and all(
        a is b is None or torch.equal(a, b) for a, b in zip(got[0], want[0], strict=True)
    )


def same_gradient(got, want):
    return all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(got[0], want[0], strict=True))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_name_and_none_again(model, checkpointed):
    model.gradient_checkpointing = checkpointed
    plain = type(model).iterate_forward
    cases = [(3, 2), (0, 3), (4, 1), (0, 5), None]
    own = {pair: trained(model, pair) for pair in cases}
    dpp.enable("raven")
    assert all(same(trained(model, pair), own[pair]) for pair in cases)
    assert not any("grad_memory" in key for key in model.state_dict())
    for spec, pair in (("tbptt(k=1)", (4, 1)), ("tbptt(k='all')", (0, 5)), ("bptt", (0, 5))):
        assert dpp.set_grad(model, spec) == 1
        found = trained(model, (3, 2))
        assert same_gradient(found, own[pair])
        assert found[1] == own[3, 2][1]  # steps, the counter of layers, the state before the last
    model.config.grad = "tbptt(k=1)"
    assert same_gradient(trained(model, (3, 2)), own[4, 1])
    dpp.set_grad(model, None)
    assert all(same(trained(model, pair), own[pair]) for pair in cases)
    assert "grad" not in vars(model.config)
    dpp.set_grad(model, "bptt")
    dpp.disable("raven")
    assert same(trained(model), own[3, 2])
    assert type(model).iterate_forward is plain


def test_that_a_function_is_not_saved_is_said(model):
    dpp.enable("raven")
    dpp.set_grad(model, "npg")
    saved = model.config.grad
    with pytest.warns(dpp.AssumptionWarning, match="which a config cannot name"):
        dpp.set_grad(model, lambda func, equilibrium, context: func(equilibrium))
    assert model.config.grad == saved


def test_the_depth_is_its_own_draw(model):
    own = trained(model, None)
    dpp.enable("raven")
    for spec in ("npg", "ift", "jfb", "upg(k=3, lam=1.0)", "bptt"):
        dpp.set_grad(model, spec)
        found = trained(model, None)
        assert torch.allclose(found[0][0], own[0][0], rtol=1e-12)
        assert torch.equal(found[0][-1], own[0][-1])
        assert found[1]["steps"] == own[1]["steps"]
        assert not same_gradient(found, own)


def test_one_number_has_no_graph_of_its_own_and_a_named_one_all_the_same(model):
    assert trained(model, 5)[0][2] is None  # the adapter's weights
    dpp.enable("raven")
    dpp.set_grad(model, "tbptt(k=2)")
    assert same_gradient(trained(model, 5), trained(model, (3, 2)))


def test_evaluation_is_its_own(model):
    model.eval()
    with torch.no_grad():
        own = trained(model, None)
    dpp.enable("raven")
    dpp.set_grad(model, "npg")
    with torch.no_grad():
        assert same(trained(model, None), own)
    with pytest.warns(dpp.AssumptionWarning, match="in evaluation mode"):
        assert trained(model, None)[0][2] is None
    dpp.set_grad(model, "tbptt(k=2)", in_eval=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trained(model, (3, 2))[0][2] is not None


def test_a_cache_is_filled_once(model):
    dpp.enable("raven")
    cache = {}
    trained(model, (2, 2), cache)
    assert sorted(cache) == [*range(1, 9)]
    dpp.set_grad(model, "npg")
    with pytest.raises(ValueError, match=r"a cache in training.*use_cache=False"):
        trained(model, (2, 2), {})
    with torch.no_grad():
        trained(model, (2, 2), cache := {})
    assert sorted(cache) == [*range(1, 9)]


def test_it_is_observed_with_its_own_gradient_and_with_a_named_one(model):
    own, logged = trained(model), []
    with dpp.monitor(model, lambda numbers, step: logged.append(numbers), every=1):
        assert same(trained(model), own)
        dpp.enable("raven")
        dpp.set_grad(model, "npg")
        trained(model)
        with pytest.raises(ValueError, match="a cache in training"):
            trained(model, (2, 2), {})
    assert len(logged) == 2
    dpp.disable("raven")
    assert same(trained(model), own)


def test_another_version_is_refused_and_runs_untouched(model, monkeypatch):
    own = trained(model)
    known = raven.KNOWN
    monkeypatch.setattr(raven, "KNOWN", ("0" * 16,))
    dpp.enable("raven")
    for name in (
        lambda: dpp.set_grad(model, "npg"),
        lambda: dpp.monitor(model, print).__enter__(),
    ):
        with pytest.raises(ValueError, match=rf"is {known[0]}, an unknown version; known are 000"):
            name()
    assert same(trained(model), own)


def test_a_wrong_name_changes_nothing(model):
    own = trained(model)
    dpp.enable("raven")
    with pytest.raises(ValueError, match="nonsense"):
        dpp.set_grad(model, "nonsense")
    assert same(trained(model), own)


@pytest.mark.parametrize("spec", ["bptt", {"name": "bptt"}, dpp.BPTT], ids=str)
def test_what_is_saved_is_what_acts(model, module, spec):
    own = trained(model, (0, 5))  # all five evaluations with a graph, by its own code
    dpp.enable("raven")
    dpp.set_grad(model, spec)
    assert same_gradient(trained(model, (3, 2)), own)
    config = module.RavenConfig()
    config.grad = model.config.grad
    loaded = module.RavenForCausalLM(config).double().train()
    loaded.load_state_dict(model.state_dict(), strict=False)
    assert same_gradient(trained(loaded, (3, 2)), own)


def test_a_gradient_without_a_text_leaves_the_saved_one(model):
    class Mine(dpp.GradStrategy):
        def attach(self, func, equilibrium, context):
            return func(equilibrium)

    dpp.enable("raven")
    dpp.set_grad(model, "npg")
    saved = model.config.grad
    with pytest.warns(dpp.AssumptionWarning, match=r"has no text that a config could save"):
        dpp.set_grad(model, Mine)
    assert model.config.grad == saved


def test_it_is_said_where_the_host_is_not_enabled(model):
    own = trained(model)
    with pytest.warns(dpp.AssumptionWarning, match=r'not act.*dpp\.enable\("raven"\)'):
        assert dpp.set_grad(model, "tbptt(k=1)") == 1
    assert same(trained(model), own)
    want = trained(model, (4, 1))
    dpp.enable("raven")
    assert same_gradient(trained(model), want)
