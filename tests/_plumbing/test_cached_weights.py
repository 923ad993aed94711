"""Weights that are cached while a solve runs without autograd: their originals get a gradient."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torchdeq import get_deq
from torchdeq.norm import apply_norm, reset_norm

import deq_phantom_plugin as dpp

SPECS = [
    "jfb",
    "upg",
    "upg(checkpoint=True)",
    "upg(lam='adaptive')",
    "npg",
    "npg(lam='adaptive')",
    "ift",
    "ift(higher_order=True)",
    "exact",
    "bptt(steps=5)",
    "reversible(steps=3)",
    "guard('ift')",
    "guard('upg')",
]


class Layer(nn.Module):
    """F with a weight that is made from others."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(6, 6).double()
        make = {
            "weight_norm": parametrizations.weight_norm,
            "spectral_norm": parametrizations.spectral_norm,
            "old weight_norm": nn.utils.weight_norm,
            "old spectral_norm": nn.utils.spectral_norm,
        }
        make[kind](self.inner)
        self.x = torch.randn(4, 6, dtype=torch.float64)
        self.eval()  # or spectral normalisation changes the map

    def forward(self, h):
        return torch.tanh(0.5 * self.inner(h) + self.x)

    def solved(self):
        with torch.no_grad():
            h = torch.zeros_like(self.x)
            for _ in range(60):
                h = self(h)
        return h


def gradients(layer, spec, cached, context=None, inside=True):
    layer.zero_grad()
    with parametrize.cached() if cached else contextlib.nullcontext():
        loss = dpp.attach(layer, layer.solved(), spec, context).square().mean()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    return [p.grad for p in layer.parameters()]


def assert_same(got, want):
    assert all(g is not None for g in want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize(
    "kind", ["weight_norm", "spectral_norm", "old weight_norm", "old spectral_norm"]
)
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("spec", SPECS)
def test_originals_get_the_same_gradient_inside_cached(spec, inside, kind):
    """Whether backward runs inside the block as well, or behind it."""
    layer = Layer(kind)
    got = gradients(layer, spec, cached=True, inside=inside)
    assert_same(got, gradients(layer, spec, cached=False))


@pytest.mark.parametrize("spec", ["upg", "ift"])
def test_with_a_memory_too(spec):
    layer, memory = Layer("weight_norm"), dpp.Memory()
    want = gradients(layer, spec, cached=False)
    for _ in range(2):
        assert_same(gradients(layer, spec, True, dpp.Context(memory=memory)), want)


def test_a_weight_is_made_once_and_not_in_every_step():
    layer, made = Layer("weight_norm"), []
    layer.inner.parametrizations.weight.register_forward_hook(
        lambda *_: made.append(torch.is_grad_enabled())
    )
    with parametrize.cached():
        dpp.attach(layer, layer.solved(), "upg(k=5)")
    assert made == [False, True]


def test_what_comes_after_it_in_the_same_block_has_a_gradient():
    layer = Layer("weight_norm")
    with parametrize.cached():
        dpp.attach(layer, layer.solved(), "upg")
        assert layer.inner.weight.requires_grad


def test_the_regulariser_reaches_the_originals():
    layer, found = Layer("weight_norm"), []
    for cached in (False, True):
        torch.manual_seed(0)
        with parametrize.cached() if cached else contextlib.nullcontext():
            h = layer.solved()
            reg = dpp.jacobian_reg(layer, h)
            weights = list(layer.inner.parametrizations.weight.parameters())
            found.append(torch.autograd.grad(reg, weights))
    assert_same(found[1], found[0])


@pytest.mark.parametrize("spec", ["upg", "npg", "ift"])
def test_in_torchdeq(spec):
    layer, found = Layer("weight_norm"), []
    with dpp.enabled("torchdeq"):
        deq = get_deq(grad=spec, f_max_iter=60, f_tol=1e-12).train()
        for cached in (False, True):
            layer.zero_grad()
            with parametrize.cached() if cached else contextlib.nullcontext():
                deq(layer, torch.zeros_like(layer.x))[0][-1].square().mean().backward()
            found.append([p.grad.clone() for p in layer.parameters()])
    assert_same(found[1], found[0])


@pytest.mark.parametrize("spec", ["upg", "npg", "ift", "ift(higher_order=True)"])
def test_torchdeqs_own_normalisation(spec):
    """It makes the weights when it is reset, with autograd: central differences agree."""
    torch.manual_seed(0)
    inner, x = nn.Linear(4, 4).double(), torch.randn(3, 4, dtype=torch.float64)
    apply_norm(inner, "weight_norm")
    func = lambda h: torch.tanh(0.3 * inner(h) + x)  # noqa: E731

    def loss(attach):
        reset_norm(inner)
        with torch.no_grad():
            h = torch.zeros_like(x)
            for _ in range(80):
                h = func(h)
        return (dpp.attach(func, h, attach) if attach else func(h)).sum()

    exactly = spec.replace("upg", "upg(k=80, lam=1)").replace("npg", "npg(k=80, lam=1)")
    exactly = exactly.replace("ift", "ift(tol=1e-12)") if exactly == "ift" else exactly
    exactly = exactly.replace("(higher", "(tol=1e-12, higher")
    parameter = next(p for p in inner.parameters() if p.dim() == 2)
    (got,) = torch.autograd.grad(loss(exactly), parameter)
    direction = torch.linspace(-1, 1, parameter.numel(), dtype=torch.float64).view_as(parameter)
    with torch.no_grad():
        parameter += 1e-5 * direction
        above = loss(None)
        parameter -= 2e-5 * direction
        below = loss(None)
    torch.testing.assert_close((got * direction).sum(), (above - below) / 2e-5, rtol=1e-6, atol=0)


@pytest.mark.parametrize("spec", SPECS)
def test_autocasts_cache(spec):
    """PyTorch keeps the casts of weights, and some of its versions those without autograd too."""
    torch.manual_seed(0)
    inner, x, found = nn.Linear(6, 6), torch.randn(4, 6), []
    for cache in (False, True):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            func = lambda h: torch.tanh(0.3 * inner(h) + x)  # noqa: E731
            with torch.no_grad():
                h = torch.zeros(4, 6)
                for _ in range(30):
                    h = func(h).float()
            h = dpp.attach(func, h, spec)
        found.append(torch.autograd.grad(h.sum(), list(inner.parameters())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize(
    "spec", ["upg(checkpoint=True)", "ift(higher_order=True)", "reversible(steps=20)", "npg", "jfb"]
)
@pytest.mark.parametrize("owner", ["attach", "Equilibrium"])
def test_what_comes_after_the_equilibrium_uses_the_weight_too(owner, spec, steps):
    """A read-out with the same weight: what a solve has cached is no constant there either."""

    def gradients(block):
        torch.manual_seed(2)
        layer = parametrizations.weight_norm(nn.Linear(4, 4).double())
        x = torch.randn(3, 4, dtype=torch.float64)
        equilibrium = dpp.Equilibrium("fixed_point", spec, max_iter=60, tol=1e-12)

        def by_hand(func, h):
            with torch.no_grad():
                for _ in range(60):
                    h = func(h)
            return dpp.attach(func, h, spec, dpp.Context(batch_dim=0))

        solve = by_hand if owner == "attach" else equilibrium
        for _ in range(steps):
            layer.zero_grad()
            with block():
                h = solve(lambda h: torch.tanh(0.4 * layer(h) + x), torch.zeros_like(x))
                layer(h).square().sum().backward()
        return [p.grad for p in layer.parameters()]

    torch.testing.assert_close(gradients(parametrize.cached), gradients(contextlib.nullcontext))
