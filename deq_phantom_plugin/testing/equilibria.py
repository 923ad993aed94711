"""The suite of tests for every equilibrium that takes a strategy by name, with a hook or without.

The tests check what observers see, and that training is the same with a monitor.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .. import diagnostics
from ..hosts import Solve, disable, find_equilibria
from .host_case import HostCase, bitwise, solves

KINDS = ["dropout", "batch norm", "spectral norm"]


class EquilibriumSuite:
    """Tests of what observers are told, and that training is the same with them; see `HostSuite`.

    Attributes:
        case: the framework and its model.
    """

    case: ClassVar[HostCase]

    @pytest.fixture(autouse=True)
    def _isolated(self) -> Iterator[None]:
        if self.case.missing:
            pytest.skip(self.case.missing)
        torch.manual_seed(0)
        yield
        disable()

    @pytest.fixture
    def enabled(self) -> HostCase:
        """The case, with its host at work."""
        return self.case

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        ("grad", "every"),
        [("own", 2), ("upg(k=2, lam=0.7)", 2), ("ift(max_iter=9)", 1), ("bptt(steps=3)", 2)],
    )
    @pytest.mark.filterwarnings("ignore")  # with dropout in F nothing converges
    def test_training_does_not_notice_a_monitor(
        self, enabled: HostCase, grad: str, kind: str, every: int
    ) -> None:
        if grad.startswith("bptt") and not enabled.owns_solve:
            pytest.skip("the host refuses strategies that own the solve")
        spec = enabled.own if grad == "own" else grad
        plain, watched = (Trained(enabled, spec, kind, each) for each in (None, every))
        assert watched.losses == plain.losses
        bitwise(watched.end, plain.end)
        steps = set(range(0, 5, every))
        assert {step for step, _ in watched.logged} == steps
        pairs = zip(plain.evaluations, watched.evaluations, strict=True)
        for step, (own, seen) in enumerate(pairs):
            assert seen[0] == own[0]  # no further evaluation in the forward pass
            assert seen[1] > own[1] if step in steps else seen == own
        for _, values in watched.logged:
            names = {name.rpartition("/")[2] for name in values}
            assert {"forward_residual", "spectral_radius", "cosine"} <= names

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.filterwarnings("ignore")
    def test_a_residual_is_evaluated_when_it_is_asked_for_and_leaves_no_trace(
        self, enabled: HostCase, kind: str
    ) -> None:
        def run(observe: bool) -> tuple[Any, list[int], list[Solve]]:
            evaluations: list[int] = []
            solves: list[Solve] = []
            model = enabled.model("upg(k=2, lam=0.7)", inside := enabled.inside(kind))
            inside.register_forward_hook(lambda *args: evaluations.append(1))
            if observe:
                ((host, module),) = find_equilibria(model)
                end = host.observe(module, solves.append)
            torch.manual_seed(2)
            enabled.loss(model)
            if observe:
                end()
            return model, evaluations, solves

        _, unobserved, _ = run(observe=False)
        model, evaluations, solves = run(observe=True)
        assert solves
        assert len(evaluations) == len(unobserved)
        before = {**copy.deepcopy(model.state_dict()), "random": torch.get_rng_state()}
        for solve in solves:
            evaluations.clear()
            assert solve.residual is solve.residual
            assert len(evaluations) == enabled.calls * (solve.known_residual is None)
        bitwise({**model.state_dict(), "random": torch.get_rng_state()}, before)

    @pytest.mark.parametrize(("grad", "nfe"), [("bptt(steps=3)", 3), ("reversible(steps=2)", 4)])
    def test_a_strategy_that_solves_is_observed_where_it_ended(
        self, enabled: HostCase, grad: str, nfe: int
    ) -> None:
        if not enabled.owns_solve:
            pytest.skip("the host refuses strategies that own the solve")
        model = enabled.model(grad)
        taken = solves(model, lambda: enabled.loss(model))
        assert taken
        for solve in taken:
            found, attached = tree_leaves(solve.equilibrium), tree_leaves(solve.attached)
            assert all(torch.equal(a, b) for a, b in zip(found, attached, strict=True))
            assert not any(leaf.requires_grad for leaf in found)
            assert solve.nfe == nfe
            assert solve.residual.max() < 0.5 * relative_size(solve, solve.initial_state).max()
            torch.testing.assert_close(solve.residual, relative_size(solve, solve.equilibrium))


class Trained:
    """Five steps of training, with or without a monitor.

    Args:
        case: the framework and its model.
        grad: the gradient method.
        kind: the kind of module inside F, see `HostCase.inside`.
        every: the `every` of the monitor; None for no monitor.

    Attributes:
        losses: the loss of each step.
        evaluations: for each step, evaluations of F in the forward pass, and in the whole step.
        logged: (step, numbers) for each log of the monitor.
        end: the model's state, and the random state, after the last step.
    """

    def __init__(self, case: HostCase, grad: Any, kind: str, every: int | None = None) -> None:
        model = case.model(grad, inside := case.inside(kind))
        evaluations: list[int] = []
        self.losses: list[float] = []
        self.evaluations: list[tuple[int, int]] = []
        self.logged: list[tuple[Any, Any]] = []
        inside.register_forward_hook(lambda *args: evaluations.append(1))
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        handle = every and diagnostics.monitor(
            model, lambda values, step: self.logged.append((step, values)), every=every
        )
        torch.manual_seed(2)
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


def relative_size(solve: Solve, state: Any) -> Tensor:
    """Return ||F(h) - h|| / ||F(h)|| per sample, computed for one sample after the other."""
    with torch.no_grad():
        images, states = tree_leaves(solve.func(state)), tree_leaves(state)
    sizes = []
    for one in [slice(None)] if solve.batch_dim is None else range(len(states[0])):
        f = torch.cat([leaf[one].flatten() for leaf in images])
        h = torch.cat([leaf[one].flatten() for leaf in states])
        sizes.append((f - h).norm() / f.norm())
    return torch.stack(sizes)
