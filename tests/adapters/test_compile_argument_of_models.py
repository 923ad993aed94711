"""`compile=True` of the models: gradients, how often F is compiled, lengths, configs."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import deq_phantom_plugin as dpp

ONE_PASS = ("upg(k=2)", "jfb", "bptt(steps=3)", "upg(k=2, checkpoint=True)")
AS_WRITTEN = ("npg(k=3)", "ift", "exact", "reversible(steps=3)", "upg(lam='adaptive')")


@pytest.fixture(autouse=True)
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


def language_model(**settings):
    transformer = pytest.importorskip("deq_phantom_plugin.adapters.transformer")
    torch.manual_seed(0)
    config = transformer.DEQTransformerConfig(
        **{
            "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2,
            "f_solver": "fixed_point_fast", "f_max_iter": 30, "f_tol": 1e-6, **settings,
        }
    )  # fmt: skip
    return transformer.DEQTransformerForCausalLM(config).double()


def decoder_layer(compile=False):
    transformer = pytest.importorskip("deq_phantom_plugin.adapters.transformer")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2,
        num_hidden_layers=1, attn_implementation="sdpa",
    )  # fmt: skip
    return transformer.deq_from_layer(
        LlamaDecoderLayer(config, 0), f_solver="fixed_point_fast", f_tol=1e-6, compile=compile
    ).double()


def of_tokens(model, lengths=(7,)):
    """The gradients of a step at each length, with padding and dropout, and of an evaluation."""
    generator, found = torch.Generator().manual_seed(1), []
    for length in lengths:
        ids = torch.randint(32, (2, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        torch.manual_seed(2)
        model.train().zero_grad()
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
        with torch.no_grad():
            found.append([model.eval()(ids, attention_mask=mask).logits])
    return found


def of_states(layer):
    """The same of one layer."""
    x = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    layer.train().zero_grad()
    layer(x.requires_grad_()).square().sum().backward()
    found = [x.grad.clone(), *(p.grad.clone() for p in layer.parameters())]
    with torch.no_grad():
        return [found, [layer.eval()(x)]]


def of_nodes(model):
    """The same of a graph network."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 4, dtype=torch.float64, generator=generator)
    edges = torch.randint(9, (2, 24), generator=generator)
    weight = torch.rand(24, dtype=torch.float64, generator=generator).requires_grad_()
    model.train().zero_grad()
    model(x, edges, weight).square().sum().backward()
    found = [weight.grad.clone(), *(p.grad.clone() for p in model.parameters())]
    with torch.no_grad():
        return [found, [model.eval()(x, edges, weight)]]


def graph_network(compile=False, activation="tanh"):
    ignn = pytest.importorskip("deq_phantom_plugin.adapters.ignn")
    torch.manual_seed(0)
    return ignn.IGNN(
        4, 6, 3, num_layers=2, task="node", normalize=False, lambda_pf=4.0, bias=True,
        activation=activation, f_tol=1e-9, compile=compile,
    ).double()  # fmt: skip


MODELS = {
    "transformer": (lambda compile: language_model(dropout=0.2, compile=compile), of_tokens, 4),
    "deq_from_layer": (decoder_layer, of_states, 4),
    "ignn": (graph_network, of_nodes, 8),  # two layers
}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_map_as_written_and_only_the_first_step_compiles(name, graphs):
    make, step, most = MODELS[name]
    plain, model = make(False), make(True)
    for spec in (*ONE_PASS, *AS_WRITTEN, "upg(k=2)"):
        for each in (plain, model):
            dpp.set_grad(each, spec)
        before = len(graphs)
        want = step(plain)
        assert len(graphs) == before  # nothing of the plain model
        got = step(model)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
        if spec == ONE_PASS[0]:
            first = len(graphs)
            assert 0 < first <= most
    assert len(graphs) == first


@pytest.mark.parametrize("spec", AS_WRITTEN[:2])
def test_products_are_of_the_map_as_it_was_written(spec, graphs):
    model = language_model(grad=spec, compile=True, jac_reg_weight=0.1)
    want = of_tokens(language_model(grad=spec, jac_reg_weight=0.1))
    torch.testing.assert_close(of_tokens(model), want, rtol=1e-9, atol=1e-12)
    assert len(graphs) == 2  # of the solve, where the injection has a graph and where not


def test_another_length_compiles_once_for_all_lengths(graphs):
    model, lengths = language_model(grad="upg(k=2)", compile=True), (7, 5, 9, 6, 11)
    of_tokens(model, lengths[:2])
    seen = len(graphs)
    got = of_tokens(model, lengths)
    assert len(graphs) == seen
    want = of_tokens(language_model(grad="upg(k=2)"), lengths)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_models_do_not_use_up_each_others_compilations(graphs):
    models = [decoder_layer(True) for _ in range(3)]
    want = of_states(decoder_layer())
    limit = torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True)
    with limit:
        for model in models:
            torch.testing.assert_close(of_states(model), want, rtol=1e-9, atol=1e-12)


def test_what_is_compiled_is_let_go_with_its_owner():
    layer = decoder_layer(True)
    of_states(layer)
    gone = weakref.ref(layer)
    del layer
    torch.compiler.reset()
    gc.collect()
    assert gone() is None


def test_generation_solves_behind_its_cache_as_written(graphs):
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    wanted = language_model().eval().generate(prompt, max_new_tokens=4, do_sample=False)
    model = language_model(compile=True).eval()
    assert torch.equal(model.generate(prompt, max_new_tokens=4, do_sample=False), wanted)
    assert len(graphs) == 1  # of the prompt


@pytest.mark.parametrize("compile", [True, "reduce-overhead"])
def test_a_config_keeps_it(compile, tmp_path):
    model = language_model(compile=compile)
    assert model.state_dict().keys() == language_model().state_dict().keys()
    model.save_pretrained(tmp_path)
    config = type(model.config).from_pretrained(tmp_path)
    assert config.compile == compile
    assert type(model).from_pretrained(tmp_path).config.compile == compile
    assert copy.deepcopy(config).compile == compile


def test_what_is_written_into_a_config_acts_from_the_next_step_on(graphs):
    model = language_model()
    of_tokens(model)
    assert not graphs
    model.config.compile = True
    of_tokens(model)
    assert graphs


def test_copies_and_old_pickles(graphs):
    layer = decoder_layer("reduce-overhead")
    of_states(layer)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.compiles == "reduce-overhead"
        torch.testing.assert_close(of_states(twin), of_states(layer))
    del layer.__dict__["compiles"]  # as in a pickle from before it was there
    assert layer.compiles is False


@pytest.mark.parametrize("wrong", ["", None, 1, ["default"]])
def test_what_is_no_mode_is_refused(wrong):
    said = r"compile=.* expected True, False, or a mode of torch.compile"
    with pytest.raises(ValueError, match=said):
        language_model(compile=wrong)
    with pytest.raises(ValueError, match=said):
        decoder_layer(wrong)
    with pytest.raises(ValueError, match=said):
        graph_network(wrong)
    model = language_model()
    with pytest.raises(ValueError, match=said):
        model.config.compile = wrong


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_normalisation_that_the_compiler_gets_is_the_one_that_was_written(layout):
    from deq_phantom_plugin.adapters.mdeq.layers import GroupNorm

    def gradients(normalise):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(3, 12, 4, 6, dtype=torch.float64, generator=generator)
        x = (5 + x).contiguous(memory_format=layout).requires_grad_()
        norm = GroupNorm(4, 12).double()
        with torch.no_grad():
            norm.weight.uniform_(0.5, 2, generator=generator)
            norm.bias.normal_(generator=generator)
        image = normalise(norm)(x)
        weights = torch.randn(image.shape, dtype=image.dtype, generator=generator)
        inputs = (x, norm.weight, norm.bias)
        return [image, *torch.autograd.grad((image * weights).sum(), inputs)]

    want = gradients(lambda n: lambda x: F.group_norm(x, 4, n.weight, n.bias, n.eps))
    for normalise in (lambda n: n, lambda n: torch.compile(lambda x: n(x), None, False)):
        torch.testing.assert_close(gradients(normalise), want, rtol=1e-10, atol=1e-12)


def test_of_few_bits_the_compiler_gets_pytorchs_normalisation(graphs):
    from deq_phantom_plugin.adapters.mdeq.layers import GroupNorm

    norm, x = GroupNorm(4, 12).bfloat16(), torch.randn(3, 12, 4, 6, dtype=torch.bfloat16)
    image = torch.compile(lambda x: norm(x), None, False)(x)
    assert len(graphs) == 1
    torch.testing.assert_close(image, nn.GroupNorm.forward(norm, x), rtol=0, atol=0)
