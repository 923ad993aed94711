"""Maps that are not the same map twice: found out, named, and kept fixed where we can."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import deq_phantom_plugin as dpp
from deq_phantom_plugin.contract.errors import AssumptionWarning
from deq_phantom_plugin.draws import SameDraws
from deq_phantom_plugin.inspection import inspect_map


class Adapted(nn.Module):
    """A linear layer with what PEFT puts beside it."""

    def __init__(self, base, p, rank=3):
        super().__init__()
        self.base, self.drop = base, nn.Dropout(p)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + 0.3 * self.up(self.down(self.drop(x)))


class Noise(nn.Module):
    def forward(self, x):
        return x + 0.01 * torch.randn_like(x)


class Alpha(nn.Module):
    """A module that draws in its own code and has children that do not."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return nn.functional.alpha_dropout(self.inner(x), 0.2, self.training)


def spectral(old=False):
    norm = nn.utils.spectral_norm if old else nn.utils.parametrizations.spectral_norm
    module = norm(nn.Linear(6, 6))
    weight = module.weight_orig if old else module.parametrizations.weight.original
    with torch.no_grad():  # as a step of training does; the vectors are then behind
        weight.copy_(torch.linalg.qr(torch.randn(6, 6)).Q * torch.linspace(0.9, 1, 6))
    return module


def changing_maps():
    generator = torch.Generator().manual_seed(3)
    calls = []
    linear = nn.Linear(6, 6)

    def of(module):
        return lambda h: 0.3 * torch.tanh(module(h))

    def by_its_own_generator(h):
        return 0.3 * linear(h) + 0.1 * torch.randn(h.shape, generator=generator)

    def by_a_counter(h):
        calls.append(1)
        return 0.3 * linear(h) + 0.1 * (-1) ** len(calls)

    return {
        "dropout": (of(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3))), "Dropout draws at random"),
        "an adapter": (of(Adapted(nn.Linear(6, 6), 0.3)), "Dropout draws at random"),
        "noise": (of(nn.Sequential(nn.Linear(6, 6), Noise())), "Noise draws at random"),
        "a parent": (of(Alpha()), "Alpha draws at random"),
        "spectral norm": (of(spectral()), "_SpectralNorm updates its buffers"),
        "spectral norm by a hook": (of(spectral(old=True)), "Linear updates its buffers"),
        "F itself": (
            lambda h: nn.functional.dropout(0.3 * linear(h), 0.2),
            "F itself draws at random",
        ),
        "another generator": (by_its_own_generator, "draws from another"),
        "a counter": (by_a_counter, "keeps state elsewhere"),
    }


@pytest.mark.parametrize("name", changing_maps())
def test_what_draws_or_updates_is_named_once(name):
    func, cause = changing_maps()[name]
    h = torch.randn(5, 6)
    with pytest.warns(AssumptionWarning, match="not the same map each time") as said:
        for _ in range(2):
            dpp.attach(func, h, "guard('ift', forward_tol=1e9)")
    assert len(said) == 1
    assert cause in str(said[0].message)


@pytest.mark.parametrize("name", changing_maps())
def test_a_report_says_that_first_and_gives_no_other_advice(name):
    func, cause = changing_maps()[name]
    params = [torch.ones(6, requires_grad=True)]
    report = dpp.gradient_report(
        lambda h: func(h) * params[0], torch.randn(5, 6), lambda h: h.square().sum(), params
    )
    assert report.map_difference > 1e-5
    assert "not deterministic" in report.recommendation[0]
    assert cause in report.recommendation[0]
    assert not any(word in str(report) for word in ("Tighten", "Float64"))


@pytest.mark.parametrize("seed", range(5))
def test_what_draws_seldom_is_found_too(seed):
    """Two evaluations may skip the same layer by chance."""
    torch.manual_seed(seed)
    linear = nn.Linear(6, 6)

    def func(h):
        return 0.3 * linear(h) * (torch.rand(()) > 0.3) / 0.7

    found = inspect_map(func, torch.randn(5, 6))
    assert found.difference > 0
    assert found.reasons == ("F itself draws at random",)


def test_batch_statistics_are_not_blamed_for_dropout():
    module = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.3))
    found = inspect_map(lambda h: 0.3 * module(h), torch.randn(8, 6))
    assert found.reasons == ("Dropout draws at random",)


def test_reports_and_radii_leave_no_trace():
    module = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.3))
    before, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    func, h = lambda h: 0.3 * module(h), torch.ones(8, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dpp.gradient_report(func, h, lambda h: h.square().sum(), list(module.parameters()))
        dpp.spectral_radius(func, h)
    assert torch.equal(state, torch.get_rng_state())
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


def same_maps():
    drop = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3))
    batch_norm = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    linear = nn.Linear(6, 6)
    mask = torch.empty(5, 6).bernoulli_(0.7)

    def in_bfloat16(h):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.tanh(linear(h)).to(h.dtype)

    return {
        "dropout in evaluation": copy.deepcopy(drop).eval(),
        "a mask of the solve": lambda h: linear(h) * mask,
        "dropout with the same draws": SameDraws(drop),
        "batch statistics": batch_norm,  # updates buffers that its value does not depend on
        "spectral norm in evaluation": spectral().eval(),
        "bfloat16 inside": in_bfloat16,
    }


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", same_maps())
def test_no_false_alarm(name, autocast):
    func = same_maps()[name]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = inspect_map(lambda h: (0.3 * func(h)).to(h.dtype), torch.randn(5, 6))
    assert found.difference == 0
    assert found.reasons == ()


def test_looking_changes_nothing():
    model = nn.Sequential(spectral(), nn.BatchNorm1d(6), nn.Dropout(0.2))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    versions = {name: buffer._version for name, buffer in model.named_buffers()}
    found = inspect_map(lambda h: 0.3 * model(h), torch.randn(5, 6).clone())
    torch.set_rng_state(state)
    assert found.difference > 0
    torch.manual_seed(4)
    state = torch.get_rng_state()
    inspect_map(lambda h: 0.3 * model(h), torch.ones(5, 6))
    assert torch.equal(state, torch.get_rng_state())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert {name for name, buffer in model.named_buffers() if buffer._version == versions[name]}


def test_a_graph_that_holds_a_buffer_can_still_go_back():
    """Putting a buffer back is no change that autograd has to refuse."""
    norm = nn.BatchNorm1d(6)
    h = torch.randn(5, 6)
    out = norm(h.requires_grad_())
    inspect_map(lambda h: 0.3 * norm(h), h.detach())
    out.square().sum().backward()


# --- the same draws at every evaluation ----------------------------------------------------------


def test_the_first_evaluation_draws_as_it_would_anyway_and_later_ones_draw_nothing():
    drop = nn.Dropout(0.4)
    x = torch.ones(50)
    torch.manual_seed(7)
    want, after = drop(x), torch.rand(3)
    torch.manual_seed(7)
    func = SameDraws(drop)
    got = [func(x), func(x), func(x)]
    assert torch.equal(after, torch.rand(3))
    assert all(torch.equal(want, each) for each in got)
    assert not torch.equal(want, SameDraws(drop)(x))  # another solve, another mask


def test_a_map_that_draws_nothing_leaves_the_random_state_alone(monkeypatch):
    func = SameDraws(nn.Linear(3, 3))
    func(torch.ones(2, 3))
    monkeypatch.setattr(torch, "set_rng_state", None)  # is not called
    func(torch.ones(2, 3))


def adapted_transformer(p, f_tol=1e-6):
    from deq_phantom_plugin.adapters.transformer import (
        DEQTransformerConfig,
        DEQTransformerForCausalLM,
    )

    torch.manual_seed(0)
    config = DEQTransformerConfig(
        vocab_size=19,
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        hidden_act="gelu",
        f_solver="broyden_fast",
        f_max_iter=100,
        f_tol=f_tol,
        grad="ift(tol=1e-5)",
    )
    model = DEQTransformerForCausalLM(config)
    for name in ("qkv", "down"):
        setattr(model.model.block, name, Adapted(getattr(model.model.block, name), p))
    return model.train()


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_a_transformer_with_adapters_in_its_block_has_an_equilibrium(p):
    model, tokens = adapted_transformer(p), torch.randint(19, (3, 7))
    with warnings.catch_warnings():
        warnings.simplefilter("error", AssumptionWarning)
        out = model(tokens, labels=tokens)
    assert out.equilibrium_info.residual.max() < 1e-5
    again = model(tokens, labels=tokens)
    assert (out.loss == again.loss) == (p == 0)  # masks are those of a solve, not for ever


def test_its_gradient_is_that_of_the_map_with_its_masks():
    """Central differences, with the random state of the forward pass put back for each."""
    model, tokens = adapted_transformer(0.2, f_tol=1e-13).double(), torch.randint(19, (2, 5))
    dpp.set_grad(model, "ift(tol=1e-10, max_iter=200)")
    weight = model.model.block.qkv.up.weight
    with torch.no_grad():
        weight.normal_(std=0.3)

    def loss():
        torch.manual_seed(11)
        states = model.model(tokens).last_hidden_state  # a causal model's loss is in float32
        return (states * torch.linspace(-1, 2, states.numel()).view(states.shape)).sum()

    (gradient,) = torch.autograd.grad(loss(), weight)
    direction = torch.randn_like(weight)
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            weight.add_(direction, alpha=sign * 1e-4)
            values.append(loss().item())
            weight.add_(direction, alpha=-sign * 1e-4)
    slope = (values[0] - values[1]) / 2e-4
    assert abs((gradient * direction).sum().item() - slope) <= 1e-3 * abs(slope)


@pytest.mark.parametrize("training", [True, False])
def test_a_decoder_layer_keeps_the_masks_of_dropout_that_others_put_there(training):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    from deq_phantom_plugin.adapters.transformer import deq_from_layer

    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2
    )
    layer = LlamaDecoderLayer(config, 0)
    layer.mlp.up_proj = Adapted(layer.mlp.up_proj, 0.3)
    block = deq_from_layer(layer, f_max_iter=80, f_tol=1e-5).train(training)
    layer.mlp.up_proj.drop.train()  # Monte Carlo dropout keeps it on in evaluation
    x = torch.randn(2, 5, 16)
    with torch.set_grad_enabled(training):
        first = block(x)
        assert block.last.residual.max() < 1e-4
        assert not torch.equal(first, block(x))


# --- running statistics --------------------------------------------------------------------------

# What docs/concepts/assumptions.md says that each strategy adds, forward and in backward.
UPDATES = {
    "jfb": (1, 0),
    "npg": (1, 0),
    "npg_rr": (1, 0),
    "ift": (1, 0),
    "exact": (1, 0),
    "upg(k=3)": (3, 0),
    "upg(k=3, lam='adaptive')": (4, 0),
    "upg(k=3, checkpoint=True)": (3, 3),
    "bptt(steps=4)": (4, 0),
    "reversible(steps=4)": (8, 0),
    "ift(higher_order=True)": (1, 1),
    "guard('ift')": (2, 0),
}


@pytest.mark.parametrize("batch_dim", ["auto", None])
@pytest.mark.parametrize("spec", UPDATES)
def test_what_running_statistics_see(spec, batch_dim):
    norm, linear = nn.BatchNorm1d(4), nn.Linear(4, 4)
    h, x = torch.zeros(6, 4), torch.randn(6, 4)

    def func(h):
        return torch.tanh(0.1 * norm(linear(h) + x) + x)

    with torch.no_grad():
        for _ in range(60):
            h = func(h)

    def updates():
        return int(norm.num_batches_tracked) - 60

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AssumptionWarning)
        attached = dpp.attach(func, h, spec, dpp.Context(batch_dim=batch_dim))
    forward = updates()
    attached.square().sum().backward()
    assert (forward, updates() - forward) == UPDATES[spec]


# --- in 16 bits ----------------------------------------------------------------------------------


class Dropped(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.linear, self.drop = nn.Linear(6, 6), nn.Dropout(p)

    def forward(self, h):
        return 0.5 * self.drop(torch.tanh(self.linear(h)))


@pytest.mark.parametrize("state", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("p", [0.0, 0.05])
def test_coarse_rounding_does_not_hide_what_draws(p, state):
    torch.manual_seed(0)
    module = Dropped(p).to(state)
    inside = torch.bfloat16 if state is torch.float32 else state
    with torch.autocast("cpu", inside, enabled=state is torch.float32):
        found = inspect_map(lambda h: module(h).to(h.dtype), torch.randn(40, 6).to(state))
    assert (found.difference > 0) == (p > 0)
    assert found.reasons == (("Dropout draws at random",) if p else ())


def test_batch_statistics_in_16_bits_are_no_alarm():
    module = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).bfloat16()
    assert inspect_map(module, torch.randn(9, 6).bfloat16()).difference == 0


# --- in backward ---------------------------------------------------------------------------------

AGAIN = ["upg(checkpoint=True)", "reversible(steps=30)", "ift(higher_order=True)"]


@pytest.mark.parametrize("spec", [*AGAIN, "upg", "npg", "ift", "bptt"])
@pytest.mark.parametrize("reused", [False, True])
def test_a_variable_that_has_another_value_in_backward_is_said(spec, reused):
    """x = deq(lambda h: f(h, x), h0): right where nothing is evaluated again, else a warning."""
    torch.manual_seed(0)
    linear = nn.Linear(6, 6).double()
    torch.nn.init.orthogonal_(linear.weight, 0.6)
    first, second = (dpp.Equilibrium(grad=g, tol=1e-12, max_iter=200) for g in (spec, "ift"))
    given = torch.randn(4, 6, dtype=torch.float64)

    def gradient(reused):
        linear.zero_grad()
        x = given
        if reused:
            x = first(lambda h: torch.tanh(linear(h) + x), torch.zeros_like(x))
            x = second(lambda h: torch.sin(linear(h)) + x, torch.zeros_like(x))
        else:
            y = first(lambda h: torch.tanh(linear(h) + given), torch.zeros_like(x))
            x = second(lambda h: torch.sin(linear(h)) + y, torch.zeros_like(x))
        x.square().sum().backward()
        return linear.weight.grad.clone()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = gradient(reused)
        right = gradient(False)
    said = [str(w.message) for w in caught if "given another value since" in str(w.message)]
    is_right = torch.allclose(found, right, rtol=1e-6)
    assert len(said) == (1 if spec in AGAIN and reused else 0)
    assert is_right == (not said)


@pytest.mark.parametrize("spec", AGAIN)
def test_what_is_the_same_again_is_not_blamed(spec):
    """Batch statistics, 16 bits, masks of a solve, a second backward pass."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(6)
    drop = Dropped(0.3)
    x = torch.randn(5, 6)
    equilibrium = dpp.Equilibrium(grad=spec, tol=1e-4, batch_dim=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", AssumptionWarning)
        func = SameDraws(lambda h: 0.3 * torch.tanh(norm(drop(h))) + x)
        with torch.autocast("cpu", torch.bfloat16):
            h = equilibrium(func, torch.zeros_like(x))
        for _ in range(2):
            h.float().sum().backward(retain_graph=True)


def test_a_state_whose_sums_overflow_in_16_bits_is_compared_too():
    x = torch.full((4, 64), 6e4, dtype=torch.float16)
    weight = torch.ones(64, dtype=torch.float16, requires_grad=True)
    scale = [1.0]
    h = dpp.attach(lambda h: weight * x * scale[0], x, "upg(k=1, lam=1.0, checkpoint=True)")
    scale[0] = 0.5
    with pytest.warns(AssumptionWarning, match="evaluated again in backward"):
        (h * torch.full_like(h, 1e-6)).sum().backward()


# --- where code may be compiled ------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec", ["reversible(steps=4)", "upg(k=4, lam=1.0, checkpoint=True)", "bptt(steps=4)"]
)
def test_kept_masks_are_evaluated_once_by_whoever_counts(spec):
    """With the compiler imported, who counts what autograd saves finds the same again."""
    import torch._dynamo

    torch.manual_seed(0)
    module, norm = Dropped(0.3).double(), nn.BatchNorm1d(6).double()
    x = torch.randn(5, 6, dtype=torch.float64)

    def func(h):
        return module(h) + 0.3 * torch.tanh(norm(h)) + x

    def by_hand(steps):
        """The masks of the first evaluation at every step."""
        module.zero_grad()
        torch.manual_seed(1)
        start, h = torch.get_rng_state(), torch.zeros_like(x)
        for _ in range(steps):
            torch.set_rng_state(start)
            h = func(h)
        h.sum().backward()
        return module.linear.weight.grad.clone()

    torch.manual_seed(1)
    context = dpp.Context(batch_dim=0)
    dpp.attach(SameDraws(func), torch.zeros_like(x), spec, context).sum().backward()
    got = module.linear.weight.grad.clone()
    if spec.startswith("reversible"):  # two states in turn: another recursion
        assert bool(got.abs().sum() > 0)
        return
    if spec.startswith("bptt"):
        assert int(norm.num_batches_tracked) == 4
    torch.testing.assert_close(got, by_hand(4))
