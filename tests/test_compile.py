"""torch.compile, torch.export, torch.func and copies of models, with every strategy."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torchdeq import get_deq

import deq_phantom_plugin as dpp

SPECS = [
    "bptt(steps=4)",
    "exact",
    "guard('ift')",
    "ift",
    "ift(higher_order=True)",
    "ift(warm_start=True)",
    "jfb",
    "npg",
    "npg(clip=0.4)",
    "npg_rr",
    "reversible(steps=2)",
    "schedule({0: 'upg', 9: 'npg'})",
    "upg",
    "upg(k=2, checkpoint=True)",
    "upg(lam='adaptive')",
]
HOSTED = [*SPECS, "shine", "shine(refine=2)"]


class OwnLoop(nn.Module):
    """A model that solves by a loop of its own."""

    def __init__(self, grad):
        super().__init__()
        torch.manual_seed(0)
        self.inject, self.inner, self.out = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        nn.init.normal_(self.inner.weight, std=0.1)
        self.grad = dpp.get_strategy(grad)
        self.memory = dpp.Memory()
        dpp.set_step(self, 0)

    def solve(self, func, start):
        with torch.no_grad():
            h = start
            for _ in range(15):
                h = func(h)
        context = dpp.Context(initial_state=start, memory=self.memory)
        return dpp.attach(func, h, self.grad, context)

    def forward(self, x):
        u = self.inject(x)
        return self.out(self.solve(lambda h: torch.tanh(self.inner(h) + u), torch.zeros_like(u)))


class Hosted(OwnLoop):
    """The same on TorchDEQ."""

    def __init__(self, grad):
        super().__init__("jfb")
        solver = "broyden_fast" if "shine" in grad else "fixed_point_iter"
        self.deq = get_deq(grad=grad, f_solver=solver, f_max_iter=20, f_tol=1e-4)
        dpp.set_step(self, 0)

    def solve(self, func, start):
        return self.deq(func, start)[0][-1]


@pytest.fixture
def x():
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def hooked():
    with dpp.enabled("torchdeq"):
        yield


def gradients(model, x):
    torch.manual_seed(1)  # npg_rr draws
    model.zero_grad()
    model(x).sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_compiles(make, spec, x):
    torch._dynamo.reset()
    want = [gradients(model, x) for model in [make(spec)] for _ in range(3)]
    compiled = torch.compile(make(spec), backend="aot_eager")
    for step in range(3):
        got = gradients(compiled, x)
        torch.testing.assert_close(got, want[step], rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("spec", SPECS)
def test_a_compiled_model_with_a_loop_of_its_own(spec, x):
    assert_compiles(OwnLoop, spec, x)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("spec", HOSTED)
def test_a_compiled_model_on_torchdeq(spec, x):
    assert_compiles(Hosted, spec, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("spec", ["upg", "npg", "ift", "reversible(steps=2)"])
def test_a_compiled_f_in_an_eager_model(spec, x):
    class CompiledF(OwnLoop):
        def forward(self, x):
            u = self.inject(x)
            func = torch.compile(lambda h: torch.tanh(self.inner(h) + u), backend="aot_eager")
            return self.out(self.solve(func, torch.zeros_like(u)))

    torch._dynamo.reset()
    want, got = gradients(OwnLoop(spec), x), gradients(CompiledF(spec), x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS)
def test_export_of_the_evaluation(spec, x):
    model = OwnLoop(spec).eval()
    with torch.no_grad():
        want = model(x)
        program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), want)


def called_with_other_parameters(make, spec, x):
    model, other = make(spec), make(spec)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.7)
    params = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    torch.manual_seed(1)
    loss = torch.func.functional_call(model, params, (x,)).sum()
    got = torch.autograd.grad(loss, list(params.values()))
    assert all(p.grad is None for p in model.parameters())
    return list(got), gradients(other, x)


# These evaluate F again in backward, when the parameters are the module's own once more. (As
# torch.utils.checkpoint does, which does not notice.)
AGAIN = {"ift(higher_order=True)", "reversible(steps=2)"}
CHECKPOINTED = {"upg(k=2, checkpoint=True)"}


@pytest.mark.parametrize("make", [OwnLoop, Hosted])
@pytest.mark.parametrize("spec", sorted({*SPECS} - AGAIN - CHECKPOINTED))
def test_functional_call(make, spec, x):
    got, want = called_with_other_parameters(make, spec, x)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("make", [OwnLoop, Hosted])
@pytest.mark.parametrize("spec", sorted(AGAIN))
def test_functional_call_is_refused_where_f_is_evaluated_again(make, spec, x):
    with pytest.raises(RuntimeError, match="functional_call take a strategy that evaluates"):
        called_with_other_parameters(make, spec, x)


@pytest.mark.parametrize("make", [OwnLoop, Hosted])
@pytest.mark.parametrize("spec", SPECS)
def test_copies_and_pickles(make, spec, x):
    model = make(spec)
    want = gradients(model, x)
    model = make(spec)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(gradients(other, x), want, rtol=0, atol=0)
        assert all(p.grad is None for p in model.parameters())
        assert repr(other) == repr(model) or "warm_start=True" in spec


@pytest.mark.parametrize("make", [OwnLoop, Hosted])
@pytest.mark.parametrize("spec", SPECS)
def test_saved_with_weights_only(make, spec, x, tmp_path):
    model, other = make(spec), make(spec)
    dpp.set_step(model, 3)
    gradients(model, x)  # which may leave something to keep
    torch.save([model.state_dict(), dpp.memory_state_dict(model)], tmp_path / "model.pt")
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    state, memory = torch.load(tmp_path / "model.pt", weights_only=True)
    other.load_state_dict(state)
    dpp.load_memory_state_dict(other, memory)
    torch.testing.assert_close(gradients(other, x), gradients(model, x), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:h is no equilibrium")  # after so few evaluations
@pytest.mark.parametrize("first", [5, "upg", "jfb"])
def test_a_compiled_layer_can_be_switched(first):
    """With PyTorch's default settings: TorchDEQ's own gradient, too, is of compiled code."""
    from deq_phantom_plugin.adapters.mdeq import MDEQ, MDEQConfig

    torch._dynamo.reset()
    config = MDEQConfig((8, 8), (2, 4), 16, f_max_iter=6, groups=4, expansion=2)
    compiled, x = MDEQ(config, grad=first).train(), torch.randn(2, 3, 8, 8)
    plain = MDEQ(config, grad="jfb").train()
    plain.load_state_dict(compiled.state_dict())
    compiled.layer.compile(backend="aot_eager")
    for grad in (first, "npg", "ift(max_iter=3, tol=0.9)", "upg(k=2)", "npg(k=2)"):
        found = []
        for model in (compiled, plain):
            dpp.set_grad(model, grad)
            model.zero_grad()
            model(x).square().sum().backward()
            found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert (found[0] - found[1]).norm() < 1e-4 * found[1].norm()
    torch._dynamo.reset()
