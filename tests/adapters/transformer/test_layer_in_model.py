"""Decoder layers as equilibria in the models that they came from, against iterations by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import deq_phantom_plugin as dpp

pytest.importorskip("transformers")
pytest.importorskip("torchdeq")
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    StaticCache,
)
from transformers.masking_utils import sdpa_mask

from deq_phantom_plugin.adapters.transformer.layer import CACHE, deq_from_layer

TIGHT = {"f_solver": "fixed_point_iter", "f_max_iter": 80, "f_tol": 1e-8}
KINDS = ["gpt2", "llama", "mistral", "qwen2", "qwen3"]
VOCAB, SIZE, LAYERS = 13, 8, 3


def language_model(kind, attention="sdpa", **settings):
    if kind == "gpt2":
        sizes = {"n_embd": SIZE, "n_head": 2, "n_layer": LAYERS}
        sizes |= {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    else:
        sizes = {"hidden_size": SIZE, "num_attention_heads": 2, "num_key_value_heads": 1}
        sizes |= {"intermediate_size": 16, "num_hidden_layers": LAYERS, "head_dim": 4}
    ends = {"bos_token_id": None, "eos_token_id": VOCAB - 1, "pad_token_id": 0}
    config = AutoConfig.for_model(
        kind, vocab_size=VOCAB, attn_implementation=attention, **{**sizes, **ends, **settings}
    )
    model = AutoModelForCausalLM.from_config(config).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    nn.init.normal_(model.get_input_embeddings().weight)
    return model


def layers_of(model):
    return model.transformer.h if model.config.model_type == "gpt2" else model.model.layers


def convert(model, which, **settings):
    """A copy with some layers as equilibria."""
    model = copy.deepcopy(model)
    layers = layers_of(model)
    for index in which:
        layers[index] = deq_from_layer(layers[index], **{**TIGHT, **settings})
    return model


class ByHand(nn.Module):
    """The equilibrium by plain iteration, backpropagated through all of it."""

    def __init__(self, layer, steps=40):
        super().__init__()
        self.layer, self.steps = layer, steps

    def forward(self, x, *args, **kwargs):
        h = torch.zeros_like(x)
        for _ in range(self.steps):
            h = F.layer_norm(self.layer(h + x, *args, **kwargs), (SIZE,))
        return h


def by_hand(model, which):
    model = copy.deepcopy(model)
    layers = layers_of(model)
    for index in which:
        layers[index] = ByHand(layers[index])
    return model


def tokens(*shape):
    return torch.randint(1, VOCAB, shape)


def gradients(model, ids, **inputs):
    model.zero_grad()
    model(ids, labels=ids, **inputs).loss.backward()
    return {
        name.replace(".layer.", "."): p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def assert_same(found, expected, rtol=1e-4, atol=1e-6):
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=atol, msg=name)


close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # noqa: E731


# --- values and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", [(1,), (0, 1, 2)])
def test_logits_and_gradients_are_those_of_the_iteration(kind, which):
    model = language_model(kind).train()
    ids = tokens(2, 6)
    ours = convert(model, which, grad="ift(tol=1e-9, max_iter=200)")
    reference = by_hand(model, which)
    expected = gradients(reference, ids, use_cache=False)
    for inputs in ({}, {"use_cache": False}):
        assert_same(gradients(ours, ids, **inputs), expected)
    close(ours(ids).logits, reference(ids, use_cache=False).logits)
    for index in which:
        assert (layers_of(ours)[index].last.residual < 1e-7).all()


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sliding_windows(kind, attention):
    settings = {"sliding_window": 3}
    if kind == "qwen2":  # one layer of each kind
        types = ["full_attention", "sliding_attention", "sliding_attention"]
        settings |= {"use_sliding_window": True, "layer_types": types}
    model = language_model(kind, attention, **settings).eval()
    ids = tokens(2, 9)
    ours, reference = convert(model, (0, 1)), by_hand(model, (0, 1))
    with torch.no_grad():
        want = reference(ids, use_cache=False).logits
        close(ours(ids).logits, want)
        close(stepwise(ours, ids, 4), want)
        # And a layer by itself.
        x, block = torch.randn(2, 9, SIZE, dtype=torch.float64), layers_of(ours)[1]
        i = torch.arange(9)
        sees = (i[:, None] >= i) & (i[:, None] - i < 3)
        close(block(x), block(x, sees[None, None]))


# --- the cache -----------------------------------------------------------------------------------


def stepwise(model, ids, first, cache=None):
    """Logits of a prompt and of one token after the other."""
    output = model(ids[:, :first], use_cache=True, **({} if cache is None else {CACHE: cache}))
    logits, cache = [output.logits], output[CACHE]
    for index in range(first, ids.shape[1]):
        output = model(ids[:, index : index + 1], use_cache=True, **{CACHE: cache})
        logits.append(output.logits)
    assert int(cache.get_seq_length()) == ids.shape[1]
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
@torch.no_grad()
def test_new_tokens_with_a_cache(kind, attention):
    model = language_model(kind, attention).eval()
    ours, reference = convert(model, (0, 2)), by_hand(model, (0, 2))
    ids = tokens(2, 8)
    want = reference(ids, use_cache=False).logits
    close(ours(ids).logits, want)
    close(stepwise(ours, ids, 3), want)
    close(stepwise(ours, ids, 3, StaticCache(config=model.config, max_cache_len=11)), want)
    # Several tokens after several, and what assisted generation takes back.
    cache = DynamicCache(config=model.config)
    ours(ids[:, :4], **{CACHE: cache})
    ours(tokens(2, 3), **{CACHE: cache})
    cache.crop(-3)
    close(ours(ids[:, 4:], **{CACHE: cache}).logits, want[:, 4:])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
@torch.no_grad()
def test_the_cache_has_the_keys_and_values_of_the_equilibrium(kind):
    model = language_model(kind).eval()
    ours = convert(model, (1,))
    block = layers_of(ours)[1]
    caught = []
    handle = block.register_forward_hook(
        lambda _, args, kwargs, out: caught.append((args, kwargs, out)), with_kwargs=True
    )
    cache = ours(tokens(2, 7), use_cache=True)[CACHE]
    handle.remove()
    ((args, kwargs, state),) = caught
    alone = DynamicCache(config=model.config)
    args = tuple(alone if arg is cache else arg for arg in args)
    kwargs = {name: alone if value is cache else value for name, value in kwargs.items()}
    block.layer(state + args[0], *args[1:], **kwargs)  # the layer at the equilibrium, as it was
    assert cache.layers[1].keys.shape[2] == 7
    close(cache.layers[1].keys, alone.layers[1].keys)
    close(cache.layers[1].values, alone.layers[1].values)


@torch.no_grad()
@torch.no_grad()
def test_only_new_tokens_are_solved_for():
    ours = convert(language_model("llama").eval(), (1,))
    lengths = set()
    layers_of(ours)[1].layer.register_forward_pre_hook(
        lambda _, args: lengths.add(args[0].shape[1])
    )
    stepwise(ours, tokens(2, 6), 4)
    assert lengths == {4, 1}


GENERATIONS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "static": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", GENERATIONS)
@torch.no_grad()
def test_generation_with_and_without_a_cache(kind, way):
    model = language_model(kind).eval()
    ours, reference = convert(model, (0, 2)), by_hand(model, (0, 2))
    batch = 1 if way == "prompt lookup" else 2
    ids = tokens(batch, 5)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[0, :2] = 0  # left padding
        ids[0, :2] = 0
    common = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    common |= {"num_beams": GENERATIONS[way].get("num_beams", 1)}
    want = reference.generate(ids, use_cache=False, **common)
    assert torch.equal(ours.generate(ids, **{**common, **GENERATIONS[way]}), want)
    assert torch.equal(ours.generate(ids, use_cache=False, **common), want)


@pytest.mark.parametrize("grad", ["ift(tol=1e-9)", "npg(k=40, lam=1.0)", "upg(k=120, lam=1.0)"])
def test_gradients_through_a_cache(grad):
    """Prefix tuning: keys and values that are trained, which a layer of its own passes on."""
    model = language_model("llama").train()
    ids = tokens(2, 5)
    prefix = [torch.randn(2, 1, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(6)]

    def cache():
        cache = DynamicCache(config=model.config)
        for index in range(LAYERS):
            cache.update(prefix[2 * index], prefix[2 * index + 1], index)
        return cache

    mask = torch.ones(2, 8, dtype=torch.long)
    ours = convert(model, (1,), grad=grad)
    loss = ours(ids, labels=ids, attention_mask=mask, **{CACHE: cache()}).loss
    found = torch.autograd.grad(loss, prefix)

    class WithCache(ByHand):
        def forward(self, x, *args, **kwargs):
            h = torch.zeros_like(x)
            for _ in range(self.steps):
                h = F.layer_norm(self.layer(h + x, *args, **{**kwargs, CACHE: cache()}), (SIZE,))
            return h

    reference = copy.deepcopy(model)
    layers_of(reference)[1] = WithCache(layers_of(reference)[1])
    loss = reference(ids, labels=ids, attention_mask=mask, **{CACHE: cache()}).loss
    for ours, theirs in zip(found, torch.autograd.grad(loss, prefix), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("grad", ["upg(k=3, checkpoint=True)", "ift(higher_order=True)"])
@pytest.mark.parametrize("cache_of", [DynamicCache, StaticCache])
def test_backward_sees_the_cache_as_it_was(grad, cache_of):
    """Strategies that evaluate F in backward do so when the cache holds the new tokens too."""
    model = language_model("llama")
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    results = []
    for spec in (grad, grad.split("(")[0] + ("(k=3)" if "upg" in grad else "(tol=1e-4)")):
        ours = convert(model, (1,), grad=spec).train()
        options = {"max_cache_len": 8} if cache_of is StaticCache else {}
        cache = cache_of(config=model.config, **options)
        with torch.no_grad():
            ours(ids[:, :3], **{CACHE: cache})
        loss = ours(ids[:, 3:], labels=ids[:, 3:], attention_mask=mask, **{CACHE: cache}).loss
        if cache_of is DynamicCache:
            ours(tokens(2, 2), **{CACHE: cache})
        loss.backward()
        results.append({name: p.grad for name, p in ours.named_parameters() if p.grad is not None})
    assert_same(*results, rtol=1e-3, atol=1e-6)


# --- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_prepared_masks(kind, attention, batch):
    """Of as many samples as tokens too, where shapes that do not belong together broadcast."""
    block = layers_of(convert(language_model(kind, attention), (0,)))[0]
    x = torch.randn(batch, 5, SIZE, dtype=torch.float64)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    added = torch.zeros(5, 5, dtype=torch.float64).masked_fill(~causal, -torch.inf)
    want = block(x)
    for mask in (causal, added):
        for shape in ((1, 1), (batch, 1), (1, 2), (batch, 2)):
            close(block(x, mask.expand(*shape, 5, 5)), want)
    # Two documents, which do not see one another.
    apart = causal & ~torch.ones(5, 5, dtype=torch.bool).tril(-1).index_fill(
        0, torch.tensor([0, 1, 2]), False
    ).index_fill(1, torch.tensor([3, 4]), False)
    if kind == "gpt2":
        close(block(x, apart[None, None])[:, 3:], block(x[:, 3:]))
    else:
        positions = torch.tensor([[0, 1, 2, 0, 1]])
        close(block(x, apart[None, None], positions)[:, 3:], block(x[:, 3:]))


def test_masks_that_cannot_be():
    block = layers_of(convert(language_model("llama"), (0,)))[0]
    x = torch.randn(2, 5, SIZE, dtype=torch.float64)
    for shape in (
        (5,),
        (2, 5, 5),
        (5, 5),
        (2, 4),
        (2, 6),
        (3, 1, 5, 5),
        (2, 3, 5, 5),
        (2, 1, 5, 6),
    ):
        with pytest.raises(ValueError, match=r"attention_mask of shape .*expected"):
            block(x, torch.ones(shape, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"of four dimensions and torch\.int64"):
        block(x, torch.ones(2, 1, 5, 5, dtype=torch.long))
    gpt2 = layers_of(convert(language_model("gpt2"), (0,)))[0]
    with pytest.raises(ValueError, match="no cross-attention"):
        gpt2(x, encoder_hidden_states=x)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_in_the_model(kind, attention, side):
    # Transformers' own eager layers make NaN of padding in float64.
    which = (0, 2) if attention == "sdpa" else (0, 1, 2)
    model = convert(language_model(kind, attention).train(), which, grad="ift(tol=1e-9)")
    short, long = tokens(1, 4), tokens(1, 7)
    none = torch.zeros(1, 3, dtype=torch.long)
    ids = torch.cat([torch.cat((none, short) if side == "left" else (short, none), dim=1), long])
    mask = (ids > 0).long()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    padded = torch.cat([logits[0][mask[0] > 0], logits[1]])
    plain = torch.cat([model(short).logits[0], model(long).logits[0]])
    close(padded, plain)
    weight, parameters = torch.randn_like(plain), list(model.parameters())
    found = torch.autograd.grad((weight * padded).sum(), parameters)
    expected = torch.autograd.grad((weight * plain).sum(), parameters)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def plain_softmax(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention that gives NaN where a query sees no key, as kernels of a GPU may."""
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    scores = query @ key.mT * scaling
    if attention_mask is None:
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    weights = scores.masked_fill(~attention_mask, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("grad", ["upg", "npg", "ift(tol=1e-9)"])
def test_rows_that_see_no_key_stay_out_of_the_gradient(grad):
    AttentionInterface.register("plain_softmax_of_a_layer", plain_softmax)
    AttentionMaskInterface.register("plain_softmax_of_a_layer", sdpa_mask)
    found = []
    for attention in ("plain_softmax_of_a_layer", "eager"):
        torch.manual_seed(0)
        block = layers_of(convert(language_model("llama", attention), (0,), grad=grad))[0]
        x = torch.randn(2, 6, SIZE, dtype=torch.float64, requires_grad=True)
        mask = torch.ones(2, 6, dtype=torch.long)
        mask[0, :2] = 0
        state = block(x, mask)
        assert (state[0, :2] == 0).all()
        inputs = [x, *block.parameters()]
        found.append(torch.autograd.grad(state.square().sum(), inputs))
    assert (found[0][0][0, :2] == 0).all()
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mask", [None, "ones", "padding"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_are_told_apart_by_a_layer(training, mask, attention):
    block = layers_of(convert(language_model("llama", attention), (0,)))[0].train(training)
    x = torch.randn(2, 7, SIZE, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    if mask is not None:
        hidden = {"ones": [], "padding": [(0, 0), (0, 6), (1, 3)]}[mask]
        mask = torch.ones(2, 7, dtype=torch.long)
        for row, column in hidden:
            mask[row, column] = 0
    real = torch.ones(2, 7, dtype=torch.bool) if mask is None else mask > 0
    with torch.set_grad_enabled(training):
        state = block(x, mask, positions)
        first = block(x[:, :4], None if mask is None else mask[:, :4])
        second = block(x[:, 4:], None if mask is None else mask[:, 4:])
    close(state[real], torch.cat([first, second], dim=1)[real])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("training", [True, False])
def test_packed_documents_in_the_model(kind, training):
    ours = convert(language_model(kind), (0, 1, 2)).train(training)
    ids = tokens(1, 7)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    with torch.set_grad_enabled(training):
        for inputs in ({}, {"use_cache": False}):
            logits = ours(ids, position_ids=positions, **inputs).logits
            close(logits[:, :4], ours(ids[:, :4]).logits)
            close(logits[:, 4:], ours(ids[:, 4:]).logits)


# --- what the model around does ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("which", [(0,), (1,), (0, 1, 2)])
@torch.no_grad()
@torch.no_grad()
def test_hidden_states_and_attentions_are_those_of_the_equilibrium(kind, which):
    model = language_model(kind, "eager").eval()
    ours = convert(model, which)
    outputs = []
    for layer in layers_of(ours):
        layer.register_forward_hook(lambda _, args, out: outputs.append((args[0], out)))
    output = ours(tokens(2, 5), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == LAYERS + 1
    assert len(output.attentions) == LAYERS
    assert torch.equal(output.hidden_states[0], outputs[0][0])
    for state, (_, out) in zip(output.hidden_states[1:-1], outputs, strict=False):
        assert torch.equal(state, out)
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
    # A layer that sees the equilibrium attends in the same way.
    index = which[-1]
    x, state = outputs[index]
    block = layers_of(ours)[index]
    caught = []
    attention = block.layer.attn if kind == "gpt2" else block.layer.self_attn
    handle = attention.register_forward_hook(lambda _, args, out: caught.append(out[1]))
    block.equilibrium_func(x)(state)
    handle.remove()
    close(output.attentions[index], caught[-1])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("grad", ["upg", "npg", "ift"])
def test_gradient_checkpointing(kind, grad):
    model = language_model(kind).train()
    ids = tokens(2, 5)
    ours = convert(model, (1,), grad=grad)
    expected = gradients(ours, ids)
    ours.gradient_checkpointing_enable()
    assert_same(gradients(ours, ids), expected, rtol=1e-6, atol=1e-9)
    ours.gradient_checkpointing_enable({"use_reentrant": True})
    if grad == "upg":
        assert_same(gradients(ours, ids), expected, rtol=1e-6, atol=1e-9)
    else:
        with pytest.raises(RuntimeError, match="set use_reentrant=False"):
            gradients(ours, ids)


def test_the_package_finds_converted_layers():
    ours = convert(language_model("llama").train(), (0, 2), grad="upg")
    ids = tokens(2, 5)
    assert dpp.set_grad(ours, "ift(tol=1e-9)") == 2
    exact = gradients(ours, ids)
    assert dpp.set_grad(ours, "npg(k=40, lam=1.0)") == 2
    assert_same(gradients(ours, ids), exact)
    seen = {}
    with dpp.monitor(ours, lambda numbers, step: seen.update(numbers), every=1):
        ours(ids, labels=ids).loss.backward()
    for index in (0, 2):
        assert seen[f"model.layers.{index}.deq/forward_residual"] < 1e-6
    report = dpp.model_report(ours, ids, lambda out: out.logits.square().mean(), ["ift(tol=1e-9)"])
    assert [each.name for each in report.reports] == [
        f"model.layers.{index}.deq" for index in (0, 2)
    ]
    for each in report.reports:
        assert each.results[0].relative_error < 1e-4


@torch.no_grad()
def test_copies_and_weights():
    ours = convert(language_model("qwen3").eval(), (1,))
    ids = tokens(2, 5)
    want = ours(ids).logits
    close(copy.deepcopy(ours)(ids).logits, want)
    other = convert(language_model("qwen3").eval(), (1,))
    other.load_state_dict(ours.state_dict())
    close(other(ids).logits, want)


@torch.no_grad()
def test_what_save_pretrained_saves(tmp_path):
    from safetensors.torch import load_model

    model = language_model("llama").eval()
    ours = convert(model, (1,))
    ids = tokens(2, 5)
    want = ours(ids).logits
    ours.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == "llama"  # nothing in it tells of the equilibrium
    again = convert(AutoModelForCausalLM.from_config(config).double().eval(), (1,))
    load_model(again, tmp_path / "model.safetensors")
    close(again(ids).logits, want)


def test_lora_finds_the_names():
    peft = pytest.importorskip("peft")
    ours = convert(language_model("llama"), (1,), grad="ift(tol=1e-9)")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(ours, config).double().train()
    ids = tokens(2, 5)
    found = gradients(model, ids)
    assert len(found) == 2 * 2 * LAYERS  # two matrices for each of two weights
    assert all(g is not None and g.abs().sum() > 0 for g in found.values())
    assert sum("layers.1.layer.self_attn" in name for name, _ in model.named_parameters()) > 0


@pytest.mark.slow
def test_a_compiled_model():
    ours = convert(language_model("llama").train(), (1,), grad="npg")
    ids = tokens(2, 6)
    expected, logits = gradients(ours, ids), ours(ids).logits
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager")
    ours.zero_grad()
    output = compiled(ids, labels=ids)
    output.loss.backward()
    close(output.logits, logits)
    found = {name.replace(".layer.", "."): p.grad for name, p in ours.named_parameters()}
    assert_same(found, expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_mask_of_another_precision_hides_the_same(dtype):
    block = convert(language_model("llama"), [0]).model.layers[0].float().eval()
    x = torch.randn(2, 5, SIZE)
    seen = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    hidden = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    with torch.no_grad():
        torch.testing.assert_close(block(x, hidden), block(x, seen))
        with pytest.raises(ValueError, match="attention_mask of zeros and ones"):
            block(x, seen.to(dtype))
