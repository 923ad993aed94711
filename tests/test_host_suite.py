"""What every host must pass."""

from __future__ import annotations

import copy
import importlib
import pickle
import warnings

import pytest
import torch
from torch import nn

import deq_phantom_plugin as dpp
from deq_phantom_plugin.hosts import find_equilibria
from deq_phantom_plugin.hosts import registry as hosts
from host_cases import CASES, OBSERVED

SPECS = ["upg(k=3, lam=0.7)", "npg(k=4, lam=0.6)", "jfb", "exact"]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request):
    if request.param.missing:
        pytest.skip(request.param.missing)
    return request.param


@pytest.fixture
def enabled(case):
    dpp.enable(case.name)
    return case


def same(a, b, tol=1e-9):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tol, atol=tol)


def bitwise(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def flat(state):
    return torch.utils._pytree.tree_flatten(state)[0]


def differs(a, b):
    return any(not torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-9) for name in a)


def resolve(path):
    """Return what a dotted name stands for."""
    parts = path.split(".")
    for i in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ImportError:
            continue
        for part in parts[i:]:
            found = getattr(found, part)
        return found
    raise ImportError(path)


def solves(model, run):
    """Return every solve that the equilibria of a model do in a run."""
    found = []
    ends = [host.observe(module, found.append) for host, module in find_equilibria(model)]
    run()
    for end in ends:
        end()
    return found


def test_doctor_knows_the_host(case):
    assert case.name in hosts.host_names()
    version, known = hosts.host_versions()[case.name]
    assert version
    assert known


@pytest.mark.parametrize("spec", SPECS)
def test_the_gradient_is_that_of_the_strategy_by_hand(enabled, spec):
    model = enabled.model(spec)
    by_host = enabled.gradients(model)
    taken = solves(model, lambda: enabled.loss(model))
    assert taken
    for solve in taken:
        parameters = [p for p in model.parameters() if p.requires_grad]
        leaves, _ = torch.utils._pytree.tree_flatten(solve.attached)
        v = [torch.randn_like(leaf) for leaf in leaves]
        context = solve.context
        hand = dpp.attach(solve.func, solve.equilibrium, spec, context)
        expected, got = (
            torch.autograd.grad(outputs, parameters, v, allow_unused=True, retain_graph=True)
            for outputs in (torch.utils._pytree.tree_flatten(hand)[0], leaves)
        )
        for a, b in zip(got, expected, strict=True):
            if a is not None or b is not None:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    same(enabled.gradients(model), by_host, tol=0)


def test_ift_is_exact(enabled):
    by_ift, exact = (enabled.gradients(enabled.model(s)) for s in (enabled.exact, "exact"))
    same(by_ift, exact, tol=enabled.precision)


def test_the_frameworks_own_gradient_is_left_alone_bit_for_bit(case):
    before = case.gradients(case.model(case.own))
    dpp.enable(case.name)
    bitwise(case.gradients(case.model(case.own)), before)
    model = case.model(case.own)
    assert solves(model, lambda: bitwise(case.gradients(model), before))  # observed, too


def test_disable_restores_the_framework(case):
    def present():
        found = {}
        for path, name in case.patched:
            owner = resolve(path)
            found[path, name] = (
                owner.__dict__.get(name) if isinstance(owner, type) else getattr(owner, name)
            )
        return found

    before = present()
    own = case.gradients(case.model(case.own))
    dpp.enable(case.name)
    during = present()
    assert all(during[key] is not before[key] for key in before)
    dpp.enable(case.name)  # idempotent
    model = case.model("upg(k=3, lam=0.7)")
    dpp.disable(case.name)
    assert present() == before
    bitwise(case.gradients(case.model(case.own)), own)
    dpp.enable(case.name)
    assert differs(case.gradients(model), own)


def test_an_observation_outlives_disable_and_leaves_nothing_behind(case):
    dpp.enable(case.name)
    model = case.model("npg(k=4, lam=0.6)")
    calls = []
    ((host, module),) = find_equilibria(model)[:1]
    end = host.observe(module, calls.append)
    case.loss(model)
    count = len(calls)
    assert count > 0
    solve = calls[0]
    assert solve.strategy == dpp.get_strategy("npg(k=4, lam=0.6)")
    assert torch.isfinite(solve.residual).all()
    dpp.set_grad(model, "jfb")
    case.loss(model)
    assert len(calls) == 2 * count
    assert calls[-1].strategy == dpp.get_strategy("jfb")
    end()
    end()
    case.loss(model)
    assert len(calls) == 2 * count


def test_switched_in_the_middle_of_training(enabled):
    model = enabled.model("jfb")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(2):
        enabled.gradients(model)
        optimizer.step()
    assert dpp.set_grad(model, "exact") == 1
    switched = enabled.gradients(model)
    fresh = enabled.model("exact")
    fresh.load_state_dict(model.state_dict(), strict=False)
    same(switched, enabled.gradients(fresh))
    with pytest.raises(ValueError, match="unknown strategy 'ipg'"):
        dpp.set_grad(model, "ipg")
    same(enabled.gradients(model), switched, tol=0)


def test_bad_names_are_refused_with_what_there_is(enabled):
    with pytest.raises(ValueError, match=r"'ipg'.*(did you mean|there are).*'upg'"):
        enabled.model("ipg")


def test_models_can_be_copied_and_pickled(enabled):
    model = enabled.model("upg(k=3, lam=0.7)")
    expected = enabled.gradients(model)
    same(enabled.gradients(copy.deepcopy(model)), expected, tol=0)
    if not enabled.pickles:
        return
    same(enabled.gradients(pickle.loads(pickle.dumps(model))), expected, tol=0)
    dpp.set_grad(model, "npg(k=4, lam=0.6)")
    switched = enabled.gradients(model)
    same(enabled.gradients(pickle.loads(pickle.dumps(model))), switched, tol=0)


def test_a_schedule_follows_the_step_and_is_resumed(enabled):
    model = enabled.model("jfb")
    jfb = enabled.gradients(model)
    dpp.set_grad(model, "schedule({0: 'jfb', 5: 'exact'})")
    dpp.set_step(model, 4)
    same(enabled.gradients(model), jfb, tol=0)
    dpp.set_step(model, 5)
    exact = enabled.gradients(model)
    assert differs(exact, jfb)
    twin = enabled.model("jfb")
    dpp.set_grad(twin, "schedule({0: 'jfb', 5: 'exact'})")
    twin.load_state_dict(model.state_dict())
    same(enabled.gradients(twin), exact, tol=0)


def test_what_a_strategy_keeps_goes_on_in_another_model(enabled):
    spec = "ift(warm_start=True, tol=1e-2)"
    model, twin, cold = (enabled.model("jfb") for _ in range(3))
    for each in (model, twin, cold):
        dpp.set_grad(each, spec)
    enabled.gradients(model)
    twin.load_state_dict(model.state_dict())
    dpp.load_memory_state_dict(twin, dpp.memory_state_dict(model))
    warm = enabled.gradients(model)  # from a first guess that is nearer than the tolerance
    same(enabled.gradients(twin), warm, tol=0)
    assert differs(enabled.gradients(cold), warm)


@pytest.mark.parametrize("named", [True, False])
def test_a_monitor_logs_residuals_and_cosines(enabled, named):
    model = enabled.model("npg(k=4, lam=0.6)" if named else enabled.own)
    logged = []
    with dpp.monitor(model, lambda values, step: logged.append((step, values)), every=1):
        expected = enabled.gradients(model)
        enabled.gradients(model)
    same(enabled.gradients(model), expected, tol=0)
    assert {step for step, _ in logged} == {0, 1}
    names = {name.rpartition("/")[2] for _, values in logged for name in values}
    assert {"forward_residual", "spectral_radius", "cosine"} <= names
    assert all(v == v for _, values in logged for v in values.values())


@pytest.fixture(params=OBSERVED, ids=lambda case: case.name)
def observed(request):
    case = request.param
    if case.missing:
        pytest.skip(case.missing)
    if case in CASES:
        dpp.enable(case.name)
    return case


class Trained:
    """Five steps of training, and evaluations of F in each: after the forward pass, in all."""

    def __init__(self, case, grad, kind, every=None):
        model = case.model(grad, inside := case.inside(kind))
        evaluations, self.evaluations, self.logged = [], [], []
        inside.register_forward_hook(lambda *args: evaluations.append(1))
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        handle = every and dpp.monitor(
            model, lambda values, step: self.logged.append((step, values)), every=every
        )
        torch.manual_seed(2)
        self.losses = []
        for _ in range(5):
            optimizer.zero_grad()
            evaluations.clear()
            loss = case.loss(model)
            forward = len(evaluations)
            loss.backward()
            optimizer.step()
            self.losses.append(loss.item())
            self.evaluations.append((forward, len(evaluations)))
        if handle:
            handle.remove()
        self.end = {**model.state_dict(), "random": torch.get_rng_state()}


KINDS = ["dropout", "batch norm", "spectral norm"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("grad", "every"),
    [("own", 2), ("upg(k=2, lam=0.7)", 2), ("ift(max_iter=9)", 1), ("bptt(steps=3)", 2)],
)
@pytest.mark.filterwarnings("ignore")  # with dropout in F nothing converges
def test_training_does_not_notice_a_monitor(observed, grad, kind, every):
    if grad.startswith("bptt") and not observed.owns_solve:
        pytest.skip("refused")
    spec = observed.own if grad == "own" else grad
    plain, watched = (Trained(observed, spec, kind, each) for each in (None, every))
    assert watched.losses == plain.losses
    bitwise(watched.end, plain.end)
    steps = set(range(0, 5, every))
    assert {step for step, _ in watched.logged} == steps
    for step, (own, seen) in enumerate(zip(plain.evaluations, watched.evaluations, strict=True)):
        assert seen[0] == own[0]  # in the forward pass never one more
        assert seen[1] > own[1] if step in steps else seen == own
    for _, values in watched.logged:
        names = {name.rpartition("/")[2] for name in values}
        assert {"forward_residual", "spectral_radius", "cosine"} <= names


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_a_residual_is_evaluated_when_it_is_asked_for_and_leaves_no_trace(observed, kind):
    def run(observe):
        evaluations, solves = [], []
        model = observed.model("upg(k=2, lam=0.7)", inside := observed.inside(kind))
        inside.register_forward_hook(lambda *args: evaluations.append(1))
        if observe:
            ((host, module),) = find_equilibria(model)
            host.observe(module, solves.append)
        torch.manual_seed(2)
        observed.loss(model)
        return model, evaluations, solves

    _, unobserved, _ = run(observe=False)
    model, evaluations, solves = run(observe=True)
    assert solves
    assert len(evaluations) == len(unobserved)
    before = {**copy.deepcopy(model.state_dict()), "random": torch.get_rng_state()}
    for solve in solves:
        evaluations.clear()
        assert solve.residual is solve.residual
        assert len(evaluations) == (solve.known_residual is None)
    bitwise({**model.state_dict(), "random": torch.get_rng_state()}, before)


@pytest.mark.parametrize(("grad", "nfe"), [("bptt(steps=3)", 3), ("reversible(steps=2)", 4)])
def test_a_strategy_that_solves_is_observed_where_it_ended(observed, grad, nfe):
    if not observed.owns_solve:
        pytest.skip("refused")
    model = observed.model(grad)
    taken = solves(model, lambda: observed.loss(model))
    assert taken
    for solve in taken:
        found, attached = flat(solve.equilibrium), flat(solve.attached)
        assert all(torch.equal(a, b) for a, b in zip(found, attached, strict=True))
        assert not any(leaf.requires_grad for leaf in found)
        assert solve.nfe == nfe
        assert solve.residual.max() < 0.5 * relative_size(solve, solve.initial_state).max()
        torch.testing.assert_close(solve.residual, relative_size(solve, solve.equilibrium))


def relative_size(solve, state):
    """The size of F(h) - h to that of F(h), written out for a sample after the other."""
    with torch.no_grad():
        images, states = flat(solve.func(state)), flat(state)
    sizes = []
    for one in [slice(None)] if solve.batch_dim is None else range(len(states[0])):
        f = torch.cat([leaf[one].flatten() for leaf in images])
        h = torch.cat([leaf[one].flatten() for leaf in states])
        sizes.append((f - h).norm() / f.norm())
    return torch.stack(sizes)


def test_copies_are_not_observed_and_each_observation_ends_by_itself(enabled):
    model, calls = enabled.model("jfb"), []
    ((host, module),) = find_equilibria(model)
    ends = [host.observe(module, calls.append) for _ in range(2)]
    copied = copy.deepcopy(model)
    enabled.loss(model)
    twice = len(calls)
    assert twice % 2 == 0
    if enabled.name != "torchdeq":  # whose hooks are those of modules
        enabled.loss(copied)
        assert len(calls) == twice
    ends[0]()
    ends[0]()
    enabled.loss(model)
    assert len(calls) == twice + twice // 2
    ends[1]()


def test_a_step_that_is_told_before_the_first_forward_counts(enabled):
    if not enabled.remembers:
        pytest.skip("a model has its memory from dpp.set_grad")
    model = enabled.model("schedule({0: 'jfb', 5: 'exact'})")
    dpp.set_step(model, 5)
    same(enabled.gradients(model), enabled.gradients(enabled.model("exact")), tol=0)


def test_a_strategy_that_solves_is_given_the_start_or_refused(enabled):
    if enabled.owns_solve:
        assert enabled.gradients(enabled.model("bptt(steps=3)"))
    else:
        with pytest.raises(ValueError, match="owns the solve"):
            enabled.gradients(enabled.model("bptt(steps=3)"))


def test_an_error_in_the_map_leaves_the_host_as_it_was(enabled):
    model = enabled.model("upg(k=3, lam=0.7)")
    expected = enabled.gradients(model)
    layer = next(m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    handle = layer.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        enabled.gradients(model)
    handle.remove()
    same(enabled.gradients(model), expected, tol=0)


def test_an_unknown_version_stays_as_it_is_unless_forced(case, monkeypatch):
    host = type(hosts._get(case.name))
    monkeypatch.setattr(host, "version", lambda self: "99.1")
    monkeypatch.setattr(hosts, "_warned", set())
    with pytest.warns(UserWarning, match=r"99\.1 is not hooked: this package knows"):
        assert case.name not in dpp.enable(case.name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert case.name not in dpp.enable(case.name)
    assert case.name in dpp.enable(case.name, force=True)


def test_two_hosts_at_once():
    cases = [case for case in CASES if not case.missing]
    if len(cases) < 2:
        pytest.skip("fewer than two frameworks are installed")
    names = dpp.enable()
    assert {case.name for case in cases} <= set(names)
    models = nn.ModuleList(case.model("jfb") for case in cases)
    assert dpp.set_grad(models, "exact") == len(cases)
    for case, model in zip(cases, models, strict=True):
        same(case.gradients(model), case.gradients(case.model("exact")))
    dpp.disable(cases[0].name)
    same(cases[1].gradients(models[1]), cases[1].gradients(cases[1].model("exact")))


def test_enabled_takes_back_what_it_enabled_and_nothing_else():
    cases = [case for case in CASES if not case.missing]
    if len(cases) < 2:
        pytest.skip("fewer than two frameworks are installed")
    first, second = cases[0].name, cases[1].name
    with dpp.enabled(first):
        dpp.enable(second)
    names = {name for name, host in hosts._hosts.items() if host.is_enabled}
    assert second in names
    assert first not in names


def test_a_broken_framework_does_not_break_the_others(monkeypatch):
    cases = [case for case in CASES if not case.missing]
    broken, working = hosts._get("torchdeq"), [case for case in cases if case.name != "torchdeq"]
    if len(cases) < 2 or not broken.installed():
        pytest.skip("fewer than two frameworks are installed")

    def patch(patches):
        raise ImportError("No module named 'something'")

    monkeypatch.setattr(broken, "patch", patch)
    with pytest.warns(UserWarning, match="torchdeq is not hooked: No module named 'something'"):
        assert working[0].name in dpp.enable()
    with pytest.raises(ImportError):
        dpp.enable("torchdeq")
    assert dpp.set_grad(working[0].model("jfb"), "upg") == 1
