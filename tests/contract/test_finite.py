"""Equilibria that are not finite: refused at once, or one call late; nothing is read on meta."""

from __future__ import annotations

import pytest
import torch

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.late_read import LateRead

WEIGHT = torch.eye(4, dtype=torch.float64).mul_(0.5).requires_grad_()


def func(h):
    return torch.tanh(h @ WEIGHT.to(h.device))


@pytest.fixture
def late(monkeypatch):
    """A device where a look would be a wait, and nothing that was left by others."""
    dpp.attach(func, torch.zeros(2, 4, dtype=torch.float64), "jfb", dpp.Context(batch_dim=0))
    monkeypatch.setattr(LateRead, "is_late", staticmethod(lambda device: True))
    yield
    monkeypatch.undo()
    from deq_phantom_plugin.contract import finite

    finite._later.waiting.clear()


def attach(fill, memory=None, spec="upg"):
    state = torch.full((2, 4), fill, dtype=torch.float64)
    return dpp.attach(func, state, spec, dpp.Context(batch_dim=0, memory=memory))


@pytest.mark.parametrize("fill", [float("nan"), float("inf"), float("-inf")])
def test_at_once_where_nobody_has_to_wait(fill):
    with pytest.raises(ValueError, match="the equilibrium holds NaN or Inf"):
        attach(fill)


@pytest.mark.parametrize("fill", [float("nan"), float("inf"), float("-inf")])
def test_one_call_late_where_somebody_would(fill, late):
    memory = dpp.Memory()
    memory.tell(41, None, 0)
    attach(1e300)  # whose sum overflows
    attach(fill, memory)
    with pytest.raises(ValueError, match=r"before this one \(.*training step 41\) holds NaN"):
        attach(0.0)
    attach(0.0)
    attach(0.0)


def test_what_accepts_it_is_not_asked(late):
    state = torch.full((2, 4), float("nan"), dtype=torch.float64)
    context = dpp.Context(batch_dim=0, initial_state=torch.zeros_like(state))
    spec = dpp.get_strategy({"name": "guard", "grad": "upg", "on_failure": "fallback('jfb')"})
    dpp.attach(func, state, spec, context)
    attach(0.0)


def test_empty_batches(late):
    empty = torch.zeros(0, 4, dtype=torch.float64)
    for _ in range(3):
        dpp.attach(func, empty, "upg", dpp.Context(batch_dim=0))


@pytest.mark.parametrize(
    "spec",
    [
        "upg",
        "upg(k=3, lam=0.5)",
        "npg",
        "jfb",
        "tbptt(k=2)",
        "bptt",
        "reversible",
        "npg_rr",
    ],
)
def test_on_the_meta_device_nothing_is_read(spec):
    """There any look at a number is an error."""
    weight = torch.zeros(4, 4, device="meta", requires_grad=True)
    f = lambda h: torch.tanh(h @ weight)  # noqa: E731
    for solved in (
        dpp.attach(f, torch.zeros(3, 4, device="meta"), spec, dpp.Context(batch_dim=0)),
        dpp.loop(f, torch.zeros(3, 4, device="meta"), 6, spec, dpp.Context(batch_dim=0)),
    ):
        (gradient,) = torch.autograd.grad(solved.sum(), weight)
        assert gradient.is_meta
        assert gradient.shape == weight.shape
