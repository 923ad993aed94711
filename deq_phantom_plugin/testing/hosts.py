"""The suite of tests that every host must pass.

A subclass gives a `HostCase`, which is a framework and a small model in it. The tests compare the
host's gradients with those of `attach` and `loop`, and check that the framework is restored.
"""

from __future__ import annotations

import copy
import importlib
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..attach import attach
from ..checkpoint import load_memory_state_dict, memory_state_dict
from ..diagnostics import monitor
from ..hosts import Solve, disable, enable, find_equilibria, registry
from ..loop import loop
from ..strategies.registry import get_strategy
from ..switch import set_grad, set_step
from .equilibria import EquilibriumSuite
from .host_case import HostCase, bitwise, differs, same, solves

SPECS = ["upg(k=3, lam=0.7)", "npg(k=4, lam=0.6)", "jfb", "exact"]


class HostSuite(EquilibriumSuite):
    """The contract of a host, as tests. A subclass gives the case.

    class TestMyHost(HostSuite):
        case = MyCase()
    """

    @pytest.fixture
    def enabled(self) -> HostCase:
        """The case, with its host enabled."""
        enable(self.case.name)
        return self.case

    def test_doctor_knows_the_host(self) -> None:
        case = self.case
        assert case.name in registry.host_names()
        version, known = registry.host_versions()[case.name]
        assert version
        assert known

    @pytest.mark.parametrize("spec", SPECS)
    def test_the_gradient_is_that_of_the_strategy_by_hand(
        self, enabled: HostCase, spec: str
    ) -> None:
        model = enabled.model(spec)
        by_host = enabled.gradients(model)
        taken = solves(model, lambda: enabled.loss(model))
        assert taken
        for solve in taken:
            parameters = [p for p in model.parameters() if p.requires_grad]
            leaves = tree_leaves(solve.attached)
            v = [torch.randn_like(leaf) for leaf in leaves]
            context = solve.context
            if enabled.steps is None:
                hand = attach(solve.func, solve.equilibrium, spec, context)
            else:
                hand = loop(solve.func, solve.initial_state, enabled.steps, spec, context)
            expected, got = (
                torch.autograd.grad(outputs, parameters, v, allow_unused=True, retain_graph=True)
                for outputs in (tree_leaves(hand), leaves)
            )
            for a, b in zip(got, expected, strict=True):
                if a is not None or b is not None:
                    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        same(enabled.gradients(model), by_host, tol=0)

    def test_ift_is_exact(self, enabled: HostCase) -> None:
        by_ift, exact = (enabled.gradients(enabled.model(s)) for s in (enabled.exact, "exact"))
        same(by_ift, exact, tol=enabled.precision)

    def test_the_frameworks_own_gradient_is_left_alone_bit_for_bit(self) -> None:
        case = self.case
        before = case.gradients(case.model(case.own))
        enable(case.name)
        bitwise(case.gradients(case.model(case.own)), before)
        model = case.model(case.own)
        assert solves(
            model, lambda: bitwise(case.gradients(model), before)
        )  # also while it is observed

    def test_disable_restores_the_framework(self) -> None:
        case = self.case

        def present() -> dict[tuple[str, str], Any]:
            found = {}
            for path, name in case.patched:
                owner = resolve(path)
                found[path, name] = (
                    owner.__dict__.get(name) if isinstance(owner, type) else getattr(owner, name)
                )
            return found

        before = present()
        own = case.gradients(case.model(case.own))
        enable(case.name)
        during = present()
        assert all(during[key] is not before[key] for key in before)
        enable(case.name)  # idempotent
        model = case.model("upg(k=3, lam=0.7)")
        disable(case.name)
        assert present() == before
        bitwise(case.gradients(case.model(case.own)), own)
        enable(case.name)
        assert differs(case.gradients(model), own)

    def test_an_observation_outlives_disable_and_leaves_nothing_behind(self) -> None:
        case = self.case
        enable(case.name)
        model = case.model("npg(k=4, lam=0.6)")
        calls: list[Solve] = []
        ((host, module),) = find_equilibria(model)[:1]
        end = host.observe(module, calls.append)
        case.loss(model)
        count = len(calls)
        assert count > 0
        solve = calls[0]
        assert solve.strategy == get_strategy("npg(k=4, lam=0.6)")
        assert torch.isfinite(solve.residual).all()
        set_grad(model, "jfb")
        case.loss(model)
        assert len(calls) == 2 * count
        assert calls[-1].strategy == get_strategy("jfb")
        end()
        end()
        case.loss(model)
        assert len(calls) == 2 * count

    def test_switched_in_the_middle_of_training(self, enabled: HostCase) -> None:
        model = enabled.model("jfb")
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for _ in range(2):
            enabled.gradients(model)
            optimizer.step()
        assert set_grad(model, "exact") == 1
        switched = enabled.gradients(model)
        fresh = enabled.model("exact")
        fresh.load_state_dict(model.state_dict(), strict=False)
        same(switched, enabled.gradients(fresh))
        with pytest.raises(ValueError, match="unknown strategy 'ipg'"):
            set_grad(model, "ipg")
        same(enabled.gradients(model), switched, tol=0)

    def test_bad_names_are_refused_with_what_there_is(self, enabled: HostCase) -> None:
        with pytest.raises(ValueError, match=r"'ipg'.*(did you mean|there are).*'upg'"):
            enabled.model("ipg")

    def test_models_can_be_copied_and_pickled(self, enabled: HostCase) -> None:
        model = enabled.model("upg(k=3, lam=0.7)")
        expected = enabled.gradients(model)
        same(enabled.gradients(copy.deepcopy(model)), expected, tol=0)
        if not enabled.pickles:
            return
        same(enabled.gradients(pickle.loads(pickle.dumps(model))), expected, tol=0)
        set_grad(model, "npg(k=4, lam=0.6)")
        switched = enabled.gradients(model)
        same(enabled.gradients(pickle.loads(pickle.dumps(model))), switched, tol=0)

    def test_a_schedule_follows_the_step_and_is_resumed(self, enabled: HostCase) -> None:
        model = enabled.model("jfb")
        jfb = enabled.gradients(model)
        set_grad(model, "schedule({0: 'jfb', 5: 'exact'})")
        set_step(model, 4)
        same(enabled.gradients(model), jfb, tol=0)
        set_step(model, 5)
        exact = enabled.gradients(model)
        assert differs(exact, jfb)
        twin = enabled.model("jfb")
        set_grad(twin, "schedule({0: 'jfb', 5: 'exact'})")
        twin.load_state_dict(model.state_dict())
        same(enabled.gradients(twin), exact, tol=0)

    def test_a_depth_is_drawn_for_each_step(self, enabled: HostCase) -> None:
        model = enabled.model("jfb")
        set_grad(model, "npg(k='uniform(1, 9)')")
        ((host, module),) = find_equilibria(model)
        solves: list[Solve] = []
        end, drawn = host.observe(module, solves.append), []
        for step in range(6):
            set_step(model, step)
            enabled.loss(model)
            drawn.append([getattr(solve.strategy, "k", None) for solve in solves])
            solves.clear()
            enabled.loss(model)  # again, in the same step
            assert drawn[-1] == [getattr(solve.strategy, "k", None) for solve in solves]
            solves.clear()
        end()
        assert all(isinstance(k, int) for ks in drawn for k in ks)
        assert len({*map(tuple, drawn)}) > 2
        if len(drawn[-1]) == 1:
            got = enabled.gradients(model)
            set_grad(model, f"npg(k={drawn[-1][0]})")
            same(got, enabled.gradients(model), tol=0)

    def test_what_a_strategy_keeps_goes_on_in_another_model(self, enabled: HostCase) -> None:
        spec = "ift(warm_start=True, tol=1e-2)"
        model, twin, cold = (enabled.model("jfb") for _ in range(3))
        for each in (model, twin, cold):
            set_grad(each, spec)
        enabled.gradients(model)
        twin.load_state_dict(model.state_dict())
        load_memory_state_dict(twin, memory_state_dict(model))
        warm = enabled.gradients(model)  # from a first guess that is nearer than the tolerance
        same(enabled.gradients(twin), warm, tol=0)
        assert differs(enabled.gradients(cold), warm)

    @pytest.mark.parametrize("named", [True, False])
    def test_a_monitor_logs_residuals_and_cosines(self, enabled: HostCase, named: bool) -> None:
        model = enabled.model("npg(k=4, lam=0.6)" if named else enabled.own)
        logged: list[tuple[Any, Any]] = []
        with monitor(model, lambda values, step: logged.append((step, values)), every=1):
            expected = enabled.gradients(model)
            enabled.gradients(model)
        same(enabled.gradients(model), expected, tol=0)
        assert {step for step, _ in logged} == {0, 1}
        names = {name.rpartition("/")[2] for _, values in logged for name in values}
        assert {"forward_residual", "spectral_radius", "cosine"} <= names
        assert all(v == v for _, values in logged for v in values.values())

    def test_copies_are_not_observed_and_each_observation_ends_by_itself(
        self, enabled: HostCase
    ) -> None:
        model = enabled.model("jfb")
        calls: list[Solve] = []
        ((host, module),) = find_equilibria(model)
        ends = [host.observe(module, calls.append) for _ in range(2)]
        copied = copy.deepcopy(model)
        enabled.loss(model)
        twice = len(calls)
        assert twice % 2 == 0
        if not enabled.copies_observers:
            enabled.loss(copied)
            assert len(calls) == twice
        ends[0]()
        ends[0]()
        enabled.loss(model)
        assert len(calls) == twice + twice // 2
        ends[1]()

    def test_a_step_that_is_told_before_the_first_forward_counts(self, enabled: HostCase) -> None:
        if not enabled.remembers:
            pytest.skip("a model has its memory from set_grad")
        model = enabled.model("schedule({0: 'jfb', 5: 'exact'})")
        set_step(model, 5)
        same(enabled.gradients(model), enabled.gradients(enabled.model("exact")), tol=0)

    def test_a_strategy_that_solves_is_given_the_start_or_refused(self, enabled: HostCase) -> None:
        if enabled.owns_solve:
            assert enabled.gradients(enabled.model("bptt(steps=3)"))
        else:
            with pytest.raises(ValueError, match="owns the solve"):
                enabled.gradients(enabled.model("bptt(steps=3)"))

    def test_an_error_in_the_map_leaves_the_host_as_it_was(self, enabled: HostCase) -> None:
        model = enabled.model("upg(k=3, lam=0.7)", inside := nn.Identity())
        expected = enabled.gradients(model)
        handle = inside.register_forward_pre_hook(lambda *_: 1 / 0)  # type: ignore[arg-type, return-value]
        with pytest.raises(ZeroDivisionError):
            enabled.gradients(model)
        handle.remove()
        same(enabled.gradients(model), expected, tol=0)

    def test_an_unknown_version_stays_as_it_is_unless_forced(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        case = self.case
        host = type(registry._get(case.name))
        monkeypatch.setattr(host, "version", lambda self: "99.1")
        monkeypatch.setattr(registry, "_warned", set())
        with pytest.warns(UserWarning, match=r"99\.1 is not hooked: this package knows"):
            assert case.name not in enable(case.name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert case.name not in enable(case.name)
        assert case.name in enable(case.name, force=True)


def resolve(path: str) -> Any:
    """Return the module, class or attribute of a dotted name.

    Raises:
        ImportError: if there is none.
    """
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
