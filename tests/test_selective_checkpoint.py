"""Selective activation checkpointing around an equilibrium: results are handed out by number."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint
from torch.utils.checkpoint import create_selective_checkpoint_contexts as selective

import deq_phantom_plugin as dpp

SPECS = ["upg", "npg(k=9)", "ift", "guard('upg')", "upg(lam='adaptive')", "exact", "jfb"]


def kept(context, operator, *args, **kwargs):
    is_product = operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE


class Net(nn.Module):
    def __init__(self, grad):
        super().__init__()
        torch.manual_seed(0)
        self.inside = nn.Parameter(0.3 * torch.randn(5, 5))
        self.behind = nn.Parameter(torch.randn(5, 5))
        self.equilibrium = dpp.Equilibrium("fixed_point", grad, tol=1e-6, max_iter=100)

    def forward(self, x):
        h = self.equilibrium(lambda h: torch.tanh(h @ self.inside + x), torch.zeros_like(x))
        return torch.tanh(h) @ self.behind


@pytest.mark.parametrize("grad", SPECS)
def test_gradients_are_those_without_checkpointing(grad):
    """For 40 steps, since F is inspected in the first step and again in later ones."""
    plain, saving = Net(grad), Net(grad)
    torch.manual_seed(1)
    x = torch.randn(6, 5)
    contexts = functools.partial(selective, kept)
    for _ in range(40):
        for model in (plain, saving):
            model.zero_grad()
        plain(x).square().sum().backward()
        out = checkpoint(saving, x, use_reentrant=False, context_fn=contexts)
        out.square().sum().backward()
        for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_a_monitor_and_a_report_inside():
    model, x = Net("upg"), torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    plain = Net("upg")
    plain(x).square().sum().backward()
    logged = []

    class Writer:
        def add_scalar(self, name, value, step):
            logged.append(value)

    with dpp.monitor(model, Writer(), every=1):
        contexts = functools.partial(selective, kept)
        out = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
        out.square().sum().backward()
    assert logged
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
