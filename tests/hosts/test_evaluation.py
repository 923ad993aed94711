"""Equilibria in evaluation mode: what is said there, and gradients where they are asked for."""

from __future__ import annotations

import copy
import pickle
import warnings
from importlib.util import find_spec

import pytest
import torch
from torch import nn

import deq_phantom_plugin as dpp
from deq_phantom_plugin.adapters.ignn import IGNNConv
from deq_phantom_plugin.hosts.hrm_text import HrmText
from deq_phantom_plugin.patching import Equilibrium as Patched

torchdeq = pytest.importorskip("torchdeq")

EXACT = "ift(tol=1e-12, max_iter=400)"
TIGHT = {"f_max_iter": 400, "f_tol": 1e-13}


class Model(nn.Module):
    """An equilibrium of tanh, whose solve `solve` makes, and a head on it."""

    def __init__(self, solve):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(5, 5), nn.Linear(5, 1)
        self.solve, self.evaluations = solve, 0

    def forward(self, x):
        def func(h):
            self.evaluations += 1
            return torch.tanh(0.6 * self.layer(h) + x)

        return self.head(self.solve(func, torch.zeros_like(x)))


class Hosted(nn.Module):
    """TorchDEQ, on a tensor or on a list of one."""

    def __init__(self, listed=False, **settings):
        super().__init__()
        dpp.enable("torchdeq")
        self.deq, self.listed = torchdeq.get_deq(**TIGHT, **settings), listed

    def forward(self, func, start):
        if not self.listed:
            return self.deq(func, start)[0][-1]
        return self.deq(lambda h: [func(h)], [start])[0][-1][0]


class Looped(nn.Module):
    """A patched model's solve."""

    def __init__(self, grad, **settings):
        super().__init__()
        self.equilibrium = Patched(grad, **settings)

    def forward(self, func, start):
        with torch.no_grad():
            h = start
            for _ in range(80):
                h = func(h)
        return self.equilibrium(func, h, start)


def own(grad, **settings):
    return dpp.Equilibrium("broyden", grad, tol=1e-12, max_iter=80, **settings)


SOLVES = {
    "Equilibrium": own,
    "patched": Looped,
    "torchdeq": lambda grad, **s: Hosted(grad=grad, **s),
    "torchdeq, a list": lambda grad, **s: Hosted(True, grad=grad, **s),
    "torchdeq, indexing": lambda grad, **s: Hosted(
        grad=grad, core="indexing", f_solver="broyden_fast", **s
    ),
    "torchdeq, two states": lambda grad, **s: Hosted(grad=grad, n_states=2, **s),
}


@pytest.fixture(params=SOLVES)
def solve(request):
    return SOLVES[request.param]


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(4, 5, dtype=torch.float64, generator=generator)


def told(call):
    """Return what a call returns, and the warnings about evaluation mode."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = call()
    return result, [w for w in seen if "evaluation mode" in str(w.message)]


def ignn(**settings):
    torch.manual_seed(0)
    conv = IGNNConv(5, 5, 0.7, EXACT, "tanh", f_max_iter=900, f_tol=1e-15, **settings)
    head, edges = nn.Linear(5, 1), torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]])

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = conv, head

        def forward(self, x):
            return self.head(self.conv(x, edges))

    return Net().double()


# --- what is said --------------------------------------------------------------------------------


def test_it_is_said_once_and_names_what_to_do(solve, x):
    model = Model(solve("npg")).double().eval()
    loss, seen = told(lambda: model(x).sum())
    (warning,) = seen
    assert issubclass(warning.category, dpp.AssumptionWarning)
    for word in ("model.train()", "grad_in_eval=True", "in_eval=True", "torch.no_grad()"):
        assert word in str(warning.message)
    loss.backward()
    assert model.head.weight.grad is not None
    assert model.layer.weight.grad is None
    assert told(lambda: model(x))[1] == []
    assert told(lambda: model.train()(x))[1] == []
    assert len(told(lambda: Model(solve("npg")).double().eval()(x))[1]) == 1  # another


def test_inputs_that_require_grad_count_as_well(solve, x):
    model = Model(solve("npg")).double().eval().requires_grad_(False)
    assert told(lambda: model(x))[1] == []
    assert len(told(lambda: model(x.clone().requires_grad_()))[1]) == 1


def test_there_are_no_false_alarms(solve, x):
    model = Model(solve("npg")).double().eval()
    for quiet in (torch.no_grad(), torch.inference_mode()):
        with quiet:
            assert told(lambda: model(x))[1] == []
    frozen = Model(solve("npg")).double().eval()
    frozen.layer.requires_grad_(False)  # a trained head on an equilibrium that stays as it is
    assert told(lambda: frozen(x))[1] == []
    assert told(lambda: Model(solve("npg")).double().train()(x))[1] == []
    assert told(lambda: dpp.model_report(model, x, torch.sum, ["jfb"], repeats=1))[1] == []
    told_to = Model(solve("npg", grad_in_eval=True)).double().eval()
    assert told(lambda: told_to(x))[1] == []


def test_values_and_evaluations_are_those_of_no_grad(solve, x):
    model = Model(solve("npg")).double().eval()
    with torch.no_grad():
        want = model(x)
        evaluations, model.evaluations = model.evaluations, 0
    got, seen = told(lambda: model(x))
    assert seen
    assert torch.equal(got, want)
    # Of a patched model's own solve nothing is seen: it takes one evaluation, the first time.
    assert model.evaluations == evaluations + isinstance(model.solve, Looped)
    model.evaluations = 0
    model(x)
    assert model.evaluations == evaluations


def test_an_injection_that_only_a_custom_function_sees():
    class Add(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h, u):
            return 0.5 * h + u

        @staticmethod
        def backward(ctx, grad):
            return 0.5 * grad, grad

    u = torch.ones(3, 2, requires_grad=True)
    equilibrium = dpp.Equilibrium().eval()
    assert len(told(lambda: equilibrium(lambda h: Add.apply(h, u), torch.zeros(3, 2)))[1]) == 1


def test_shapes_and_start_are_no_sign_of_a_gradient():
    u = torch.ones(3, 2, requires_grad=True)
    equilibrium = dpp.Equilibrium().eval()

    def func(h):
        return (0.5 * h + 1).to(u.dtype).reshape(u.shape)

    assert told(lambda: equilibrium(func, 0 * u))[1] == []


def test_under_func_grad(x):
    model = Model(own("npg")).double().eval()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(p):
        return torch.func.functional_call(model, p, (x,)).sum()

    _, seen = told(lambda: torch.func.grad(loss)(parameters))
    assert len(seen) == 1


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_models_are_told_too(whole, x):
    model = Model(own("npg")).double().eval()
    if whole:
        called = torch.compile(model, backend="eager")
    else:
        model.layer = torch.compile(model.layer, backend="eager")
        called = model
    got, seen = told(lambda: called(x))
    assert len(seen) == 1
    with torch.no_grad():
        want = model(x)
    torch.testing.assert_close(got, want)
    assert told(lambda: called(x))[1] == []


def test_the_evaluation_exports_with_autograd_on(x):
    def loop(func, h):
        for _ in range(12):
            h = func(h)
        return h

    class Exported(Model):
        def forward(self, x):
            def func(h):
                return torch.tanh(0.6 * self.layer(h) + x)

            return self.head(self.solve(func, torch.zeros_like(x)))

    model = Exported(dpp.Equilibrium(loop)).double().eval()
    program, seen = told(lambda: torch.export.export(model, (x,)))
    assert seen == []
    with torch.no_grad():
        want = model(x)
    torch.testing.assert_close(program.module()(x), want)


def test_ignn_is_told_and_mdeq_and_a_decoder_layer(x):
    from deq_phantom_plugin.adapters.mdeq import MDEQ

    model = MDEQ.from_preset("tiny").eval()
    images = torch.randn(1, 3, 8, 8)
    assert len(told(lambda: model(images))[1]) == 1
    assert len(told(lambda: ignn().eval()(x))[1]) == 1
    if find_spec("transformers") is None:
        return
    from transformers import LlamaConfig, LlamaModel

    from deq_phantom_plugin.adapters.transformer import deq_from_layer

    torch.manual_seed(0)
    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 16}
    llama = LlamaModel(LlamaConfig(**sizes, num_attention_heads=2, num_hidden_layers=1))
    block = deq_from_layer(copy.deepcopy(llama.layers[0])).eval()
    states = torch.randn(2, 3, 8)
    assert len(told(lambda: block(states))[1]) == 1
    block = deq_from_layer(llama.layers[0], grad_in_eval=True, f_tol=1e-6).eval()
    states.requires_grad_()
    _, seen = told(lambda: block(states).sum().backward())
    assert seen == []
    assert states.grad.any()


def test_a_language_model_from_a_checkpoint(tmp_path):
    pytest.importorskip("transformers")
    from deq_phantom_plugin.adapters.transformer import (
        DEQTransformerConfig,
        DEQTransformerForCausalLM,
    )

    config = DEQTransformerConfig(
        vocab_size=13,
        hidden_size=8,
        intermediate_size=16,
        num_attention_heads=2,
        grad="npg",
        grad_in_eval=True,
    )
    torch.manual_seed(0)
    ids = torch.randint(13, (2, 6))
    DEQTransformerForCausalLM(config).save_pretrained(tmp_path)
    model = DEQTransformerForCausalLM.from_pretrained(tmp_path)
    assert not model.training
    assert model.config.grad_in_eval

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    in_eval, seen = told(gradients)
    assert seen == []
    for got, want in zip(in_eval, (model.train(), gradients())[1], strict=True):
        assert got.any()
        torch.testing.assert_close(got, want)
    model.eval()
    dpp.set_grad(model, "npg", in_eval=False)

    def generate():
        return model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)

    assert told(generate)[1] == []
    assert len(told(lambda: model(ids))[1]) == 1
    with pytest.raises(ValueError, match="grad_in_eval='yes'; expected True or False"):
        DEQTransformerConfig(grad_in_eval="yes")


# --- the gradient in evaluation mode -------------------------------------------------------------


def forces(model, x):
    """-dE/dx of the energy that a model returns."""
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x)
    return -slope


def by_central_differences(energy, x, eps=1e-5):
    """-dE/dx, a number after the other."""
    found = torch.empty_like(x)
    with torch.no_grad():
        for i in range(x.numel()):
            step = torch.zeros_like(x).flatten()
            step[i] = eps
            step = step.view_as(x)
            found.view(-1)[i] = -(energy(x + step) - energy(x - step)).sum() / (2 * eps)
    return found


def test_forces_are_those_of_central_differences(solve, x):
    model = Model(solve(EXACT, grad_in_eval=True)).double().eval()
    torch.testing.assert_close(
        forces(model, x), by_central_differences(model, x), rtol=1e-7, atol=1e-9
    )


def test_forces_of_a_graph_network(x):
    model = ignn(grad_in_eval=True).eval()
    torch.testing.assert_close(
        forces(model, x), by_central_differences(model, x), rtol=1e-7, atol=1e-9
    )


@pytest.mark.parametrize("eval_steps", [0, 2])
def test_the_slope_of_an_image_classifier(eval_steps):
    from deq_phantom_plugin.adapters.mdeq import MDEQ, MDEQConfig

    config = MDEQConfig((8, 8), (2, 4), 8, f_max_iter=200, f_solver="fixed_point_iter", groups=4)
    settings = {"f_tol": 1e-14, "eval_steps": eval_steps, "grad_in_eval": True}
    model = MDEQ(config, 2, 1, EXACT, **settings).double()
    with torch.no_grad():  # a contraction, see `contract` in test_mdeq.py
        for finish in model.layer.finish:
            finish[-1].weight.fill_(0.05)
            finish[-1].bias.normal_()
        for part in (model.stem, model.head):  # which begin near zero
            for conv in (m for m in part.modules() if isinstance(m, nn.Conv2d)):
                conv.weight.mul_(30)
    model.eval()
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64)

    def score(images):
        return model(images)[:, 0]

    want = by_central_differences(score, x, 1e-6)
    assert want.norm() > 1e-3
    assert (forces(score, x) - want).norm() < 1e-5 * want.norm()


def test_the_slope_of_a_language_model():
    pytest.importorskip("transformers")
    from deq_phantom_plugin.adapters.transformer import (
        DEQTransformerConfig,
        DEQTransformerForCausalLM,
    )

    config = DEQTransformerConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=16,
        num_attention_heads=2,
        hidden_act="gelu",
        grad=EXACT,
        f_solver="broyden",
        f_max_iter=100,
        f_tol=1e-14,
        grad_in_eval=True,
    )
    model = DEQTransformerForCausalLM(config).double().eval()

    def score(x):
        return model(inputs_embeds=x).logits[..., 3]

    x = torch.randn(1, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(
        forces(score, x), by_central_differences(score, x), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("grad", [1, 3, "upg(k=3, lam=0.7)", "bptt(steps=6)", "npg"])
def test_it_is_the_gradient_of_training(solve, grad, x):
    if isinstance(grad, int) and not isinstance(solve("jfb"), Hosted):
        pytest.skip("numbers of steps are TorchDEQ's")
    if solve is SOLVES["torchdeq, two states"]:
        pytest.skip("a state that was sampled before changes where training solves from")
    model = Model(solve(grad, grad_in_eval=True)).double()
    inputs = list(model.parameters())
    trained, seen = (
        torch.autograd.grad(model.train(mode)(x).square().sum(), inputs) for mode in (True, False)
    )
    for a, b in zip(trained, seen, strict=True):
        assert a.any()
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_implicit_differentiation_of_torchdeq_itself(x):
    model = Model(Hosted(ift=True, b_tol=1e-13, b_max_iter=200, grad_in_eval=True)).double().eval()
    torch.testing.assert_close(
        forces(model, x), by_central_differences(model, x), rtol=1e-7, atol=1e-9
    )


def test_shine_has_its_estimate_in_evaluation_too(x):
    model = Model(Hosted(f_solver="broyden_fast", grad="shine", grad_in_eval=True)).double()
    trained, evaluated = forces(model.train(), x), forces(model.eval(), x)
    torch.testing.assert_close(trained, evaluated, rtol=1e-9, atol=1e-12)


def test_channels_last_reaches_f_in_evaluation():
    dpp.enable("torchdeq")
    conv = nn.Conv2d(4, 4, 3, padding=1)
    u = torch.randn(2, 4, 6, 6, requires_grad=True)
    deq = torchdeq.get_deq(f_solver="fixed_point_fast", grad="jfb", grad_in_eval=True).eval()
    seen = []

    def func(a, b):
        seen.append(a.is_contiguous(memory_format=torch.channels_last))
        return [torch.tanh(0.1 * conv(a) + u), 0.5 * b]

    start = torch.zeros(2, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    states, _ = deq(func, [start, torch.zeros(2, 3)])
    states[-1][0].sum().backward()
    assert all(seen)
    assert u.grad.any()


def test_it_is_switched_on_models_of_others(solve, x):
    model = Model(solve("jfb")).double().eval()
    assert dpp.set_grad(model, EXACT, in_eval=True) == 1
    want = by_central_differences(model, x)
    for each in (model, copy.deepcopy(model)):
        torch.testing.assert_close(forces(each, x), want, rtol=1e-7, atol=1e-9)
    dpp.set_grad(model, "jfb")  # which leaves it as it is
    assert forces(model, x).any()
    dpp.set_grad(model, EXACT, in_eval=False)
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        told(lambda: forces(model, x))
    with pytest.raises(ValueError, match="in_eval='yes'; expected True or False"):
        dpp.set_grad(model, EXACT, in_eval="yes")


def test_saved_models_keep_it(x):
    model = Model(own(EXACT, grad_in_eval=True)).double().eval()
    twin = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(forces(twin, x), forces(model, x), rtol=0, atol=0)


def test_training_on_forces(x):
    spec = "ift(tol=1e-13, max_iter=400, higher_order=True)"
    model = Model(own(spec)).double().train()
    target = torch.linspace(-1, 1, 20, dtype=torch.float64).view(4, 5)

    def loss():
        points = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(points).sum(), points, create_graph=True)
        return (-slope - target).square().sum()

    weight = model.layer.weight
    (got,) = torch.autograd.grad(loss(), weight)
    for i, j in ((0, 0), (2, 3), (4, 1)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[i, j] += sign * 1e-5
            values.append(loss().item())
            with torch.no_grad():
                weight[i, j] -= sign * 1e-5
        assert got[i, j].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


# --- frameworks with a way of their own ----------------------------------------------------------


@pytest.mark.skipif(not HrmText().installed(), reason="no Transformers that has hrm_text")
def test_hrm_text_says_whose_gradient_it_has():
    from host_cases import HrmTextCase

    case = HrmTextCase()
    dpp.enable("hrm_text")
    own = case.gradients(case.model(None).eval())
    model = case.model("upg(k=3, lam=0.7)")
    trained = case.gradients(model)
    got, seen = told(lambda: case.gradients(model.eval()))
    assert len(seen) == 1
    assert "L_bp_cycles" in str(seen[0].message)
    for name, value in got.items():
        torch.testing.assert_close(value, own[name], rtol=0, atol=0)
    assert told(lambda: case.loss(model))[1] == []
    dpp.set_grad(model, "upg(k=3, lam=0.7)", in_eval=True)
    got, seen = told(lambda: case.gradients(model))
    assert seen == []
    for name, value in got.items():
        torch.testing.assert_close(value, trained[name], rtol=0, atol=0)
    assert told(lambda: case.loss(case.model(None).eval()))[1] == []


@pytest.mark.parametrize("name", ["silva", "deepinv"])
def test_frameworks_that_attach_in_either_mode(name):
    from host_cases import CASES

    (case,) = (case for case in CASES if case.name == name)
    if case.missing:
        pytest.skip(case.missing)
    dpp.enable(name)
    model = case.model("jfb")
    trained = case.gradients(model)
    evaluated = case.gradients(model.eval())
    for key, value in trained.items():
        torch.testing.assert_close(evaluated[key], value)
    assert dpp.set_grad(model, "jfb()", in_eval=True) == 1
    with pytest.raises(ValueError, match=f"in_eval=False: {name} attaches in evaluation mode too"):
        dpp.set_grad(model, "jfb()", in_eval=False)


# --- forward mode --------------------------------------------------------------------------------


def _tangent(model, x, direction, grad_mode):
    with torch.set_grad_enabled(grad_mode), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, direction)
        return torch.autograd.forward_ad.unpack_dual(model(dual)).tangent


def _forward_models(**settings):
    owned = dpp.Equilibrium("fixed_point", "exact", tol=1e-13, max_iter=400, **settings)
    return [Model(owned), Model(Hosted(grad="exact", **settings))]


@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("in_eval", [True, False])
def test_no_grad_does_not_switch_tangents_off(grad_mode, in_eval):
    """As PyTorch has it: forward mode goes on under `torch.no_grad`."""
    torch.manual_seed(1)
    x, direction = torch.randn(2, 3, 5, dtype=torch.float64).unbind()
    for model in _forward_models(grad_in_eval=in_eval):
        model.double().train(not in_eval)
        with torch.no_grad():
            ahead, back = model(x + 1e-6 * direction), model(x - 1e-6 * direction)
        found = _tangent(model, x, direction, grad_mode)
        torch.testing.assert_close(found, (ahead - back) / 2e-6, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("grad_mode", [True, False])
def test_a_tangent_that_is_lost_in_evaluation_mode_is_said(grad_mode):
    """Also where all parameters are frozen, so that nothing requires grad."""
    for model in _forward_models():
        model.double().eval().requires_grad_(False)
        x, direction = torch.ones(2, 3, 5, dtype=torch.float64).unbind()
        with pytest.warns(dpp.AssumptionWarning, match="carry a tangent of forward mode"):
            assert _tangent(model, x, direction, grad_mode) is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(x)  # without a tangent there is nothing to lose
