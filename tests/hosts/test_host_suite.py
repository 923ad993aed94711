"""What every host must pass, by the suite that is shipped, and hosts beside one another."""

from __future__ import annotations

import pytest
from torch import nn

import deq_phantom_plugin as dpp
from deq_phantom_plugin.hosts import registry as hosts
from deq_phantom_plugin.testing import EquilibriumSuite, HostSuite
from deq_phantom_plugin.testing.host_case import same
from host_cases import (
    CASES,
    DeepInvCase,
    HrmTextCase,
    IgnnCase,
    OwnCase,
    PatchedCase,
    SilvaCase,
    TinyRecursiveCase,
    TorchDEQCase,
)


class TestTorchDEQ(HostSuite):
    case = TorchDEQCase()


class TestHrmText(HostSuite):
    case = HrmTextCase()


class TestTinyRecursive(HostSuite):
    case = TinyRecursiveCase()


class TestSilva(HostSuite):
    case = SilvaCase()


class TestDeepInv(HostSuite):
    case = DeepInvCase()


# Their framework is our own: there is nothing to hook.


class TestIgnn(EquilibriumSuite):
    case = IgnnCase()


class TestPatched(EquilibriumSuite):
    case = PatchedCase()


class TestOwn(EquilibriumSuite):
    case = OwnCase()


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
