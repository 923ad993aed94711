"""What was first used in inference mode, as a sanity check before training does, can be trained."""

from __future__ import annotations

import copy

import pytest
import torch

import deq_phantom_plugin as dpp


def graph_network(task, normalize, lambda_pf=None, trained=False):
    pytest.importorskip("torch_geometric")
    from deq_phantom_plugin.adapters.ignn import IGNN

    settings = {} if lambda_pf is None else {"lambda_pf": lambda_pf}
    model = IGNN(3, 4, 2, 2, task, "ift", normalize=normalize, dropout=0.0, **settings)
    edge_index = torch.randint(7, (2, 16))
    weight = (torch.rand(16) + 0.1).requires_grad_(trained)
    return model, (torch.randn(7, 3), edge_index, weight)


def image_classifier(grad):
    pytest.importorskip("torchdeq")
    from deq_phantom_plugin.adapters.mdeq import MDEQ, MDEQConfig

    config = MDEQConfig((8, 8), (2, 4), 16, f_max_iter=12, groups=4, expansion=2)
    model = MDEQ(config, grad=grad, f_solver="broyden_fast")
    return model, (torch.randn(2, 3, 8, 8),)


def language_model(grad):
    pytest.importorskip("torchdeq")
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
        bos_token_id=1,
        eos_token_id=2,
        grad=grad,
    )
    return DEQTransformerForCausalLM(config), (torch.randint(11, (2, 5)),)


def decoder_layer(grad):
    pytest.importorskip("torchdeq")
    transformers = pytest.importorskip("transformers")
    from deq_phantom_plugin.adapters.transformer.layer import deq_from_layer

    # The frequencies of dynamic scaling are kept from call to call.
    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=4,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    )
    layer = transformers.LlamaForCausalLM(config).model.layers[0]
    return deq_from_layer(layer, grad=grad), (torch.randn(2, 5, 8, requires_grad=True),)


CASES = {
    "IGNN, graphs": lambda: graph_network("graph", True),
    "IGNN, nodes, eigenvalue computed": lambda: graph_network("node", False),
    "IGNN, nodes, eigenvalue told": lambda: graph_network("node", False, 5.0),
    "IGNN, trained weights": lambda: graph_network("node", True, None, True),
    "IGNN, trained weights, eigenvalue": lambda: graph_network("node", False, None, True),
    "MDEQ": lambda: image_classifier("upg"),
    "MDEQ, shine": lambda: image_classifier("shine"),
    "MDEQ, warm start": lambda: image_classifier("ift(warm_start=True)"),
    "transformer": lambda: language_model("npg"),
    "transformer, warm start": lambda: language_model("ift(warm_start=True)"),
    "decoder layer": lambda: decoder_layer("ift"),
}


def gradients(model, args):
    out = model(*args)
    loss = getattr(out, "logits", out).square().sum()
    wanted = [*model.parameters(), *(a for a in args if a.requires_grad)]
    return torch.autograd.grad(loss, wanted, allow_unused=True)


@pytest.mark.filterwarnings("ignore::deq_phantom_plugin.contract.errors.AssumptionWarning")
@pytest.mark.filterwarnings("ignore::deq_phantom_plugin.contract.errors.ConvergenceWarning")
@pytest.mark.parametrize("case", CASES)
def test_trained_after_inference_mode(case):
    model, args = CASES[case]()
    fresh = copy.deepcopy(model)
    with torch.inference_mode():
        model.eval()(*args)
        dpp.set_step(model, 0)
        model.train()(*args)
    dpp.set_step(fresh, 0)
    for module in (model, fresh):  # batch normalisation has seen the images
        module.load_state_dict(fresh.state_dict())
    for _ in range(2):
        torch.manual_seed(1)
        found = gradients(model.train(), args)
        torch.manual_seed(1)
        expected = gradients(fresh.train(), args)
        for a, b in zip(found, expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)
        with torch.inference_mode():
            model(*args)


def test_a_graph_that_was_prepared_in_inference_mode():
    model, (x, edge_index, weight) = graph_network("node", False)
    with torch.inference_mode():
        graph = model.prepare(x, edge_index, weight * 1.0)
        model.eval()(x, graph)
    model.train()
    found = torch.autograd.grad(model(x, graph).sum(), list(model.parameters()))
    expected = torch.autograd.grad(model(x, edge_index, weight).sum(), list(model.parameters()))
    torch.testing.assert_close(found, expected)
