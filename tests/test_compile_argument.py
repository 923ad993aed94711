"""`compile=True`: F is compiled once, for the solve and for what goes through its graph once."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.compilation import compiled
from deq_phantom_plugin.forward import fixed_point

ONE_PASS = ("upg(k=2)", "tbptt(k=2)", "jfb", "bptt(steps=3)")
MANY_PRODUCTS = ("npg(k=4)", "ift")


@pytest.fixture
def graphs(monkeypatch):
    """What the compiler was given, by a backend that runs it as it is."""
    seen = []

    def backend(graph, example_inputs):
        seen.append(graph)
        return graph.forward

    compiler = torch.compile

    def compile(func, mode, dynamic):
        return compiler(func, backend=backend, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", compile)
    torch.compiler.reset()
    yield seen
    torch.compiler.reset()


class Model(nn.Module):
    """Its map is a closure made anew in each forward pass."""

    def __init__(self, spec, **options):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 6, dtype=torch.float64)
        with torch.no_grad():
            self.layer.weight.mul_(0.3)
        self.equilibrium = dpp.Equilibrium(grad=spec, **options)

    def forward(self, x):
        return self.equilibrium(lambda h: torch.tanh(self.layer(h) + x), torch.zeros_like(x))


def trained(model, steps=3):
    """The gradients of some steps."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(steps):
        x = torch.randn(4, 6, dtype=torch.float64, generator=generator)
        model.zero_grad()
        model(x).square().sum().backward()
        found.append(model.layer.weight.grad.clone())
    return found


@pytest.mark.parametrize(
    "options",
    [{"steps": 5}, {"solver": "fixed_point", "tol": 1e-6}, {"solver": "anderson", "tol": 1e-6}],
)
@pytest.mark.parametrize("spec", [*ONE_PASS, *MANY_PRODUCTS])
def test_an_equilibrium_compiles_its_map_in_the_first_step_alone(spec, options, graphs):
    want = trained(Model(spec, **options))
    assert not graphs
    model = Model(spec, compile=True, **options)
    got = trained(model, 1)
    n = len(graphs)
    assert n >= 1 or spec.startswith("bptt")
    got = trained(model)
    assert len(graphs) == n
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("spec", [*ONE_PASS, *MANY_PRODUCTS])
def test_a_loop(spec, graphs):
    layer = nn.Linear(6, 6, dtype=torch.float64)
    strategy, found = dpp.get_strategy(spec), {}
    for wanted in (False, True, True):
        x = torch.ones(4, 6, dtype=torch.float64)
        end = dpp.loop(
            lambda h, x=x: torch.tanh(layer(h) + x),
            torch.zeros_like(x),
            5,
            strategy,
            compile=wanted,
        )
        found.setdefault(wanted, []).append(torch.autograd.grad(end.sum(), layer.weight)[0])
        found.setdefault(f"{wanted} graphs", []).append(len(graphs))
    for gradient in found[True]:
        torch.testing.assert_close(gradient, found[False][0], rtol=1e-9, atol=1e-12)
    assert found["False graphs"] == [0]
    assert found["True graphs"][0] == found["True graphs"][1] >= 1


@pytest.mark.parametrize("spec", ["upg(k=2)", "npg(k=4)"])
def test_an_mdeq(spec, graphs):
    pytest.importorskip("torchdeq")
    from deq_phantom_plugin.adapters.mdeq import MDEQ

    images, found = torch.randn(2, 3, 8, 8), {}
    for compile in (False, True):
        torch.manual_seed(0)
        model = MDEQ.from_preset(
            "tiny", grad=spec, f_solver="broyden_fast", f_max_iter=6, f_tol=0.0, compile=compile
        )
        before = len(graphs)
        for step in range(3):
            model.zero_grad()
            model(images).square().sum().backward()
            if step == 0:
                after = len(graphs)
        assert len(graphs) == after
        assert (after > before) == compile
        found[compile] = torch.cat([p.grad.flatten() for p in model.parameters()])
    error = (found[True] - found[False]).norm() / found[False].norm()
    assert error < 1e-4


def test_the_compiler_keeps_one_backend_and_not_one_of_each_step():
    """PyTorch keeps what it was told of every call of `torch.compile`, until it is reset."""

    def kept():
        backends = torch._dynamo.eval_frame.cached_backends.values()
        return [backend for backend in backends if backend is not None]  # that of `disable`

    torch.compiler.reset()
    for compile in (True, "reduce-overhead"):
        compiled(lambda h: h, compile)
    assert len(kept()) == 2
    mine = torch.compile(lambda h: h, backend="eager")
    for _ in range(3):
        for compile in (True, "reduce-overhead"):
            compiled(lambda h: h, compile)
    assert len(kept()) == 3
    torch.testing.assert_close(mine(torch.ones(2)), torch.ones(2))
    torch.compiler.reset()
    compiled(lambda h: h, True)
    assert len(kept()) == 1


def test_copies_and_old_pickles():
    model = Model("upg", compile="reduce-overhead")
    assert "compile='reduce-overhead'" in repr(model)
    assert copy.deepcopy(model).equilibrium.compiles == "reduce-overhead"
    kept = pickle.loads(pickle.dumps(model.equilibrium))
    assert kept.compiles == "reduce-overhead"
    old = kept.__getstate__()
    del old["compiles"]
    kept.__setstate__(old)
    assert kept.compiles is False


@pytest.mark.parametrize("wrong", ["", None, 1, ["default"]])
def test_what_is_no_mode_is_refused(wrong):
    said = "expected True, False, or a mode of torch.compile"
    with pytest.raises(ValueError, match=said):
        dpp.Equilibrium(compile=wrong)
    with pytest.raises(ValueError, match=said):
        dpp.loop(torch.cos, torch.zeros(2), 3, compile=wrong)
    with pytest.raises(ValueError, match=said):
        fixed_point(torch.cos, torch.zeros(2), compile=wrong)
