"""Autocast and loss scaling, with every strategy, against single precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchdeq import get_deq

import deq_phantom_plugin as dpp
from deq_phantom_plugin.adjoint import SOLVERS

# Products in bfloat16 leave a residual above the default tolerance, and `ift` says so.
pytestmark = pytest.mark.filterwarnings("ignore::deq_phantom_plugin.ConvergenceWarning")

# How far gradients under bfloat16 autocast may be from those in float32, relative to their norm:
# one evaluation of F rounds to 2^-9, and the adjoint solve multiplies that by its condition.
DISTANCE = 0.02
SPECS = [
    "bptt(steps=8)",
    "exact",
    "guard('ift')",
    "ift",
    "ift(higher_order=True)",
    "jfb",
    "npg",
    "npg(clip=0.4)",
    "reversible(steps=6)",
    "upg",
    "upg(k=3, checkpoint=True)",
    "upg(lam='adaptive')",
]


class Model(nn.Module):
    def __init__(self, grad, **solver):
        super().__init__()
        torch.manual_seed(0)
        self.inject, self.inner, self.out = nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 4)
        nn.init.orthogonal_(self.inner.weight, 0.6)
        settings = {"f_solver": "fixed_point_iter", "f_max_iter": 25, "f_tol": 1e-6, **solver}
        self.deq = get_deq(grad=grad, **settings)
        self.dtypes = set()

    def forward(self, x):
        u = self.inject(x).float()

        def func(h):
            out = self.inner(h)
            self.dtypes.add(out.dtype)
            if out.requires_grad:
                out.register_hook(lambda g: self.dtypes.add(g.dtype))
            return torch.tanh(out + u)

        return self.out(self.deq(func, torch.zeros_like(u))[0][-1])


@pytest.fixture(autouse=True)
def hooked():
    with dpp.enabled("torchdeq"):
        yield


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 16, generator=generator)
    return x, torch.randint(4, (32,), generator=generator)


def gradient(model, batch, dtype=None, scale=1.0):
    x, y = batch
    model.zero_grad()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = nn.functional.cross_entropy(model(x), y)
    (loss * scale).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_under_autocast(spec, batch):
    want = gradient(Model(spec), batch)
    model = Model(spec)
    got = gradient(model, batch, torch.bfloat16)
    # F and its products are computed in 16 bits, in backward as in the forward pass.
    assert model.dtypes == {torch.bfloat16}
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert 0 < (got - want).norm() <= DISTANCE * want.norm()


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_adjoint_solvers_keep_single_precision(solver, batch, monkeypatch):
    """Their vectors and inner products; only the products with the Jacobian are in 16 bits."""
    seen = set()

    def spy(apply, rhs, tol, max_vjp):
        def watched(x):
            assert not torch.is_autocast_enabled("cpu")
            seen.update({x.dtype, rhs.dtype})
            image = apply(x)
            seen.add(image.dtype)
            return image

        found = function(watched, rhs, tol, max_vjp)
        seen.update({found.x.dtype, found.residual.dtype})
        return found

    function = SOLVERS[solver]
    monkeypatch.setattr("deq_phantom_plugin.adjoint.system.SOLVERS", {**SOLVERS, solver: spy})
    spec = f"ift(solver={solver!r}, tol=1e-2)"
    got = gradient(Model(spec), batch, torch.bfloat16)
    assert seen == {torch.float32}
    want = gradient(Model("exact"), batch)
    assert (got - want).norm() <= 2 * DISTANCE * want.norm()


@pytest.mark.parametrize("solver", ["anderson_fast", "broyden_fast", "fixed_point_fast"])
@pytest.mark.parametrize("spec", ["upg", "ift"])
def test_fast_forward_solvers(solver, spec, batch):
    want = gradient(Model(spec), batch)
    model = Model(spec, f_solver=solver, f_tol=1e-3)
    got = gradient(model, batch, torch.bfloat16)
    assert model.dtypes == {torch.bfloat16}
    assert (got - want).norm() <= 2 * DISTANCE * want.norm()


@pytest.mark.parametrize("spec", [*SPECS, "npg_rr", "shine"])
def test_a_step_that_overflows_is_skipped_and_the_next_is_right(spec, batch):
    """An infinite loss scale makes the incoming gradient infinite: no error, no step, no NaN."""
    solver = {"f_solver": "broyden_fast"} if spec == "shine" else {}
    model, reference = Model(spec, **solver), Model(spec, **solver)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    before = [p.detach().clone() for p in model.parameters()]
    x, y = batch
    for step in range(3):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y) * (1e10 if step == 0 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if step == 0:
            assert all(
                torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)
            )
            assert scaler.get_scale() == 2.0**126
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    if spec != "npg_rr":  # which draws
        other = torch.optim.SGD(reference.parameters(), 0.1)
        for _ in range(2):
            gradient(reference, batch)
            other.step()
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_states_in_16_bits(spec, dtype):
    """A model that is in 16 bits throughout; solves are in float32 within."""
    torch.manual_seed(0)
    weight = nn.init.orthogonal_(torch.empty(16, 16), 0.5)
    u = torch.randn(8, 16)
    found = []
    for kind in (torch.float32, dtype):
        w, x = weight.to(kind).requires_grad_(), u.to(kind).requires_grad_()
        func = lambda h, w=w, x=x: torch.tanh(h @ w.mT + x)  # noqa: E731
        h = torch.zeros_like(x)
        owns = dpp.get_strategy(spec).owns_solve
        with torch.no_grad():
            for _ in range(0 if owns else 30):
                h = func(h)
        attached = dpp.attach(func, h.detach(), spec)
        assert attached.dtype == kind
        grads = torch.autograd.grad(attached.float().square().sum(), (w, x))
        assert all(g.dtype == kind for g in grads)
        found.append(torch.cat([g.float().flatten() for g in grads]))
    error = (found[1] - found[0]).norm() / found[0].norm()
    assert error <= (0.004 if dtype == torch.float16 else 0.03)
