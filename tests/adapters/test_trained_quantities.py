"""Every trained quantity of the adapters, by central differences.

What an adapter computes without autograd, keeps from an earlier call or detaches, though it depends
on what is trained, is missing from the gradient, and nothing else tells.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import deq_phantom_plugin as dpp
from deq_phantom_plugin.adapters.ignn import IGNN, Graph, IGNNConv

EXACT = "ift(tol=1e-13, max_iter=600)"
TIGHT = {"f_tol": 1e-15, "f_max_iter": 5000}


def assert_slopes(loss, quantities, step=1e-6, tol=1e-5):
    """Compare gradients with central differences, each along a random direction.

    Args:
        loss: computes a scalar; the same each time.
        quantities: what it depends on, by name: tensors, or lists of tensors that change together.
        step: of the differences, in parts of a tensor's largest number.
        tol: largest difference, in parts of the gradient's own size.
    """
    wrong = {}
    for name, several in quantities.items():
        tensors = [several] if isinstance(several, torch.Tensor) else several
        gradients = torch.autograd.grad(loss(), tensors)
        assert all(gradient.any() for gradient in gradients), f"nothing depends on {name}"
        directions = [torch.randn_like(t) * (t.detach().abs().max() or 1) for t in tensors]
        values = []
        for move in (step, -2 * step, step):
            values.append(loss().item())
            with torch.no_grad():
                for tensor, direction in zip(tensors, directions, strict=True):
                    tensor += move * direction
        pairs = list(zip(gradients, directions, strict=True))
        found = sum((gradient * direction).sum().item() for gradient, direction in pairs)
        slope = (values[1] - values[2]) / (2 * step)
        size = sum((gradient * direction).norm().item() for gradient, direction in pairs)
        if not abs(found - slope) <= tol * size:
            wrong[name] = (found, slope)
    assert not wrong, f"gradient and slope differ: {wrong}"


def by_kind(module):
    """The parameters of a module that have the same last name."""
    kinds = {}
    for name, parameter in module.named_parameters():
        kinds.setdefault(name.rsplit(".", 1)[-1], []).append(parameter)
    return kinds


def probe(out):
    """A scalar of a result that no symmetry makes blind."""
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    return (weights * out + 0.5 * out.square()).sum()


def trained(tensor):
    return tensor.double().requires_grad_()


# --- graphs --------------------------------------------------------------------------------------


def directed():
    """Parallel edges, a self-loop, signs; left and right eigenvectors that differ."""
    edges = torch.randint(9, (2, 26))
    edges[:, 0], edges[:, 1] = 2, edges[:, 2]
    weight = torch.rand(26) + 0.3
    weight[::4] *= -1
    return edges, weight


def two_components():
    """A mini-batch: the second graph has the larger eigenvalue."""
    first, second = torch.randint(4, (2, 10)), torch.randint(5, (2, 20)) + 4
    return torch.cat([first, second], dim=1), torch.rand(30) + torch.arange(30) // 10


def bipartite():
    star = torch.stack([torch.zeros(8, dtype=torch.long), torch.arange(1, 9)])
    return torch.cat([star, star.flip(0)], dim=1), torch.rand(16) + 0.5


def chain():
    """Undirected: power iteration alone would take thousands of products."""
    path = torch.stack([torch.arange(8), torch.arange(1, 9)])
    return torch.cat([path, path.flip(0)], dim=1), torch.ones(16)


def cycle():
    return torch.stack([torch.arange(9), torch.arange(1, 10) % 9]), torch.rand(9) + 0.5


def acyclic():
    edges = torch.randint(9, (2, 30)).sort(dim=0).values
    return edges[:, edges[0] < edges[1]], torch.rand(30)[edges[0] < edges[1]] + 0.5


GRAPHS = [directed, two_components, bipartite, chain, cycle, acyclic]


def conv_on(edges, weight, grad=EXACT, scale=1.3, **settings):
    """A layer whose W has `scale` times the largest norm on a graph.

    Just outside of the ball: far from it the projection ends in a corner, where W's slope is zero.
    """
    conv = IGNNConv(3, 4, grad=grad, activation="tanh", **{**TIGHT, **settings}).double()
    graph = Graph(*edges, weight.detach().double(), 9)
    with torch.no_grad():
        conv.bias.normal_()
        radius = 0.9 / (conv.lambda_pf or graph.lambda_pf.clamp_min(1))
        conv.weight.uniform_(0.5, 1).mul_(torch.randn(4, 4).sign())
        conv.weight.mul_(scale * radius / conv.weight.abs().sum(dim=1, keepdim=True))
    projected = not torch.equal(conv.projected_weight(graph), conv.weight)
    assert projected == (scale > 1 and bool(conv.lambda_pf or graph.lambda_pf > 0))
    return conv


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("scale", [0.8, 1.3], ids=["W inside the ball", "W projected"])
def test_graph_layer(graph, scale):
    edges, weight = graph()
    x, weight = trained(torch.randn(9, 3)), trained(weight)
    conv = conv_on(edges, weight, scale=scale)
    tensors = {**dict(conv.named_parameters()), "x": x, "edge_weight": weight}
    assert_slopes(lambda: probe(conv(x, edges, weight)), tensors)


@pytest.mark.parametrize("grad", ["npg(k=600, lam=1.0)", "upg(k=400, lam=1.0)", "bptt(steps=600)"])
def test_graph_layer_with_other_strategies(grad):
    (edges, weight), x = directed(), trained(torch.randn(9, 3))
    weight, conv = trained(weight), conv_on(edges, weight, grad)
    tensors = {**dict(conv.named_parameters()), "x": x, "edge_weight": weight}
    assert_slopes(lambda: probe(conv(x, edges, weight)), tensors)


@pytest.mark.parametrize("layout", ["to_sparse_coo", "to_sparse_csr", "to_sparse_csc"])
def test_values_of_a_sparse_matrix(layout):
    (edges, weight), x = directed(), torch.randn(9, 3).double()
    dense = torch.zeros(9, 9).double().index_put((edges[1], edges[0]), weight.double())
    conv = conv_on(edges, weight)
    entries = dense.clone().requires_grad_()
    adj_t = lambda: getattr(torch.where(dense != 0, entries, 0), layout)()  # noqa: E731
    assert_slopes(lambda: probe(conv(x, adj_t())), {"adj_t": entries})


def test_a_graph_in_evaluation_mode_and_without_grad_is_the_same_function():
    (edges, weight), x = directed(), torch.randn(9, 3).double()
    conv, weight = conv_on(edges, weight), trained(weight)
    out = conv(x, edges, weight)
    with torch.no_grad():
        torch.testing.assert_close(conv(x, edges, weight), out.detach(), rtol=0, atol=1e-12)
    with pytest.warns(dpp.AssumptionWarning, match="in evaluation mode"):
        evaluated = conv.eval()(x, edges, weight)
    torch.testing.assert_close(evaluated, out.detach(), rtol=0, atol=1e-12)
    assert torch.equal(
        Graph(*edges, weight, 9).lambda_pf.detach(), Graph(*edges, weight.detach(), 9).lambda_pf
    )


# Products of weights of 1e6 are all rounding, in float32.
@pytest.mark.filterwarnings("ignore::deq_phantom_plugin.ConvergenceWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("graph", GRAPHS)
def test_gradients_of_weights_are_finite_in_both_precisions(graph, dtype):
    edges, weight = graph()
    weight = weight.to(dtype).requires_grad_()
    conv = IGNNConv(3, 4, activation="tanh", grad="ift").to(dtype)
    with torch.no_grad():
        conv.weight.mul_(1e6)
    conv(torch.randn(9, 3, dtype=dtype), edges, weight).square().sum().backward()
    assert torch.isfinite(weight.grad).all()
    none, weight = torch.empty(2, 0, dtype=torch.long), torch.empty(0, dtype=dtype)
    conv(torch.randn(9, 3, dtype=dtype), none, weight.requires_grad_()).sum().backward()
    assert torch.isfinite(conv.weight.grad).all()


def test_a_tie_has_a_slope_of_one_side():
    # A mini-batch of one graph twice, weights shared: both sides agree on what is shared.
    edges, weight = directed()
    both, shared = torch.cat([edges, edges + 9], dim=1), trained(weight)
    conv, x = conv_on(edges, weight), torch.randn(18, 3).double()
    loss = lambda: probe(conv(x, both, torch.cat([shared, shared])))  # noqa: E731
    assert_slopes(loss, {"edge_weight": shared})


def test_weights_trained_step_after_step_are_not_those_of_the_step_before():
    (edges, weight), x = directed(), torch.randn(9, 3).double()
    conv, weight = conv_on(edges, weight), trained(weight)
    for _ in range(3):
        (found,) = torch.autograd.grad(probe(conv(x, edges, weight)), weight)
        fresh = copy.deepcopy(conv)
        other = weight.detach().clone().requires_grad_()
        (expected,) = torch.autograd.grad(probe(fresh(x, edges, other)), other)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        weight.data -= 0.01 * found


def test_a_graph_is_refused_when_its_weights_have_been_trained():
    (edges, weight), x = directed(), torch.randn(9, 3).double()
    conv, weight = conv_on(edges, weight), trained(weight)
    graph = Graph(*edges, weight, 9)
    first = torch.autograd.grad(probe(conv(x, graph)), weight)[0]
    again = torch.autograd.grad(probe(conv(x, graph)), weight)[0]
    torch.testing.assert_close(again, first)
    with torch.no_grad():
        weight -= 0.01
    with pytest.raises(ValueError, match="weights of this Graph have changed since it was made"):
        conv(x, graph)
    with pytest.raises(ValueError, match="weights of this Graph have changed since it was made"):
        Graph(*edges, weight.detach(), 9).with_weight(2 * weight)


def test_an_eigenvalue_that_is_told_is_a_constant():
    (edges, weight), x = directed(), torch.randn(9, 3).double()
    conv, weight = conv_on(edges, weight, lambda_pf=torch.tensor(6.0)), trained(weight)
    assert conv.lambda_pf == 6.0
    assert_slopes(lambda: probe(conv(x, edges, weight)), {"edge_weight": weight})
    with pytest.raises(ValueError, match="lambda_pf is a tensor that requires grad"):
        IGNNConv(3, 4, lambda_pf=torch.tensor(4.0, requires_grad=True))


HIGHER = "ift(tol=1e-13, max_iter=600, higher_order=True)"


@pytest.mark.parametrize("grad", [HIGHER, "bptt(steps=300)"])
def test_second_derivatives_of_a_graph_layer(grad):
    # Those in W and x see the eigenvalue differentiated once, and are right, mixed with the edge
    # weights too.
    (edges, weight), x = directed(), trained(torch.randn(9, 3))
    conv, weight = conv_on(edges, weight, grad), trained(weight)

    def loss():
        # For the reference, under no_grad, the first derivatives are still taken.
        with torch.enable_grad():
            out = probe(conv(x, edges, weight))
            return sum(
                probe(g) for g in torch.autograd.grad(out, [conv.weight, x], create_graph=True)
            )

    tensors = {**dict(conv.named_parameters()), "x": x, "edge_weight": weight}
    assert_slopes(loss, tensors)


@pytest.mark.parametrize("grad", [HIGHER, "bptt(steps=50)", "upg", EXACT])
def test_second_derivatives_in_edge_weights_are_refused(grad):
    (edges, weight), x = directed(), torch.randn(9, 3).double()
    conv, weight = conv_on(edges, weight, grad), trained(weight)
    named = "second derivative.*" + ("strategy" if grad == EXACT else "lambda_pf")
    with pytest.raises(RuntimeError, match=named):
        torch.autograd.grad(probe(conv(x, edges, weight)), weight, create_graph=True)


@pytest.mark.parametrize("grad", [HIGHER, "bptt(steps=300)"])
def test_second_derivatives_where_the_eigenvalue_is_told(grad):
    (edges, weight), x = directed(), torch.randn(9, 3).double()
    conv, weight = conv_on(edges, weight, grad, lambda_pf=6.0), trained(weight)

    def loss():
        with torch.enable_grad():
            out = probe(conv(x, edges, weight))
            return probe(torch.autograd.grad(out, weight, create_graph=True)[0])

    assert_slopes(loss, {**dict(conv.named_parameters()), "edge_weight": weight})


NETWORKS = [
    {"task": "graph", "num_layers": 2},
    {"task": "node", "num_layers": 1},
    {"task": "node", "num_layers": 3},  # with skip connections
]


@pytest.mark.parametrize("settings", NETWORKS, ids=["graph", "node", "skips"])
@pytest.mark.parametrize(
    "seen",
    [{"normalize": True}, {"normalize": True, "lambda_pf": None}, {"normalize": False}],
    ids=str,
)
def test_graph_network(settings, seen):
    pytest.importorskip("torch_geometric")
    (edges, weight), x = two_components(), trained(torch.randn(9, 3))
    weight, batch = trained(weight), torch.arange(9) // 4
    model = IGNN(
        3, 4, 2, grad=EXACT, activation="tanh", bias=True, dropout=0.0, **TIGHT, **settings, **seen
    ).double()
    with torch.no_grad():
        graph = model.prepare(x, edges, weight.detach())
        for conv in model.convs:
            conv.weight.mul_(1.2 / (conv.lambda_pf or graph.lambda_pf))
    batch = batch if model.task == "graph" else None
    quantities = {**by_kind(model), "x": x, "edge_weight": weight}
    assert_slopes(lambda: probe(model(x, edges, weight, batch)), quantities)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_prepared_graph_has_the_gradient_of_its_weights(normalize):
    pytest.importorskip("torch_geometric")
    (edges, weight), x = two_components(), torch.randn(9, 3).double()
    weight = trained(weight)
    settings = {"grad": EXACT, "dropout": 0.0, "normalize": normalize}
    model = IGNN(3, 4, 2, num_layers=2, activation="tanh", **settings, **TIGHT).double()
    (expected,) = torch.autograd.grad(probe(model(x, edges, weight)), weight)
    graph = model.prepare(x, edges, weight)
    for _ in range(2):
        (found,) = torch.autograd.grad(probe(model(x, graph)), weight)
        torch.testing.assert_close(found, expected)
    with torch.no_grad():
        weight[::2] *= 2
    with pytest.raises(ValueError, match="weights of this Graph have changed since it was made"):
        model(x, graph)


# --- images --------------------------------------------------------------------------------------


def mdeq(**settings):
    pytest.importorskip("torchdeq")
    from deq_phantom_plugin.adapters.mdeq import MDEQ, MDEQConfig

    config = MDEQConfig((8, 8), (2, 4), 8, f_max_iter=10, groups=4, expansion=2)
    tight = {"f_solver": "fixed_point_iter", "f_max_iter": 200, "f_tol": 1e-14}
    model = MDEQ(config, grad=EXACT, **{**tight, **settings}).double()
    with torch.no_grad():  # a contraction, see `contract` in test_mdeq.py
        for finish in model.layer.finish:
            finish[-1].weight.fill_(0.05)
            finish[-1].bias.normal_()
    return model


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_image_classifier(dropout):
    model, images = mdeq(dropout=dropout), trained(torch.randn(2, 3, 8, 8))

    def loss():
        torch.manual_seed(3)  # the masks are part of the function
        return probe(model(images))

    quantities = {
        **by_kind(model.layer),
        "images": images,
        "classifier": model.head.classifier.bias,
    }
    assert {"weight_g", "weight_v", "weight", "bias"} < set(quantities)
    quantities["stem"] = list(model.stem.parameters())
    assert_slopes(loss, quantities, step=1e-7)
    assert (model.last.residual < 1e-13).all()


def test_regulariser_of_images():
    # The equilibrium is held fixed, as Bai, Koltun & Kolter have it; nothing else is.
    model, images = mdeq(), trained(torch.randn(2, 3, 8, 8))
    with torch.no_grad():
        state = [h + 0.1 for h in model.initial_state(model.stem(images))]

    def loss():
        torch.manual_seed(3)
        with torch.enable_grad():
            return dpp.jacobian_reg(model.equilibrium_func(model.stem(images)), state)

    quantities = by_kind(model.layer)
    del quantities["bias"]  # of the last normalisation, in part, on which no Jacobian depends
    assert_slopes(loss, {**quantities, "images": images}, step=1e-7, tol=1e-4)


# --- text ----------------------------------------------------------------------------------------


SOLVE = {"f_solver": "broyden", "f_max_iter": 100, "f_tol": 1e-14}
SIZES = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 11}


def language_model(**settings):
    pytest.importorskip("transformers")
    from deq_phantom_plugin.adapters.transformer import (
        DEQTransformerConfig,
        DEQTransformerForCausalLM,
    )

    settings = {"hidden_act": "gelu", "grad": EXACT, **SIZES, **SOLVE, **settings}
    model = DEQTransformerForCausalLM(DEQTransformerConfig(**settings)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "embed_tokens" in name:
                parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pre", [False, True], ids=["post-LN", "pre-LN"])
def test_language_model(pre, tied, padding):
    model = language_model(pre_layer_norm=pre, tie_word_embeddings=tied)
    ids, mask = torch.randint(11, (2, 5)), torch.ones(2, 5, dtype=torch.long)
    mask[0, :padding] = 0
    loss = lambda: probe(model(ids, mask).logits)  # noqa: E731
    assert_slopes(loss, dict(model.named_parameters()))
    embeddings = trained(torch.randn(2, 5, 8))
    loss = lambda: probe(model(inputs_embeds=embeddings, attention_mask=mask).logits)  # noqa: E731
    assert_slopes(loss, {"inputs_embeds": embeddings})


def test_language_model_with_dropout():
    model, ids = language_model(dropout=0.3, attention_dropout=0.3), torch.randint(11, (2, 5))

    def loss():
        torch.manual_seed(3)
        return probe(model(ids).logits)

    assert_slopes(loss, dict(model.named_parameters()))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("padding", [0, 2])
def test_decoder_layer(kind, padding):
    transformers = pytest.importorskip("transformers")
    from deq_phantom_plugin.adapters.transformer import deq_from_layer

    if kind == "gpt2":
        off = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        config = transformers.AutoConfig.for_model(kind, n_embd=8, n_head=2, n_layer=1, **off)
    else:
        one = {"num_key_value_heads": 1, "num_hidden_layers": 1, "head_dim": 4}
        config = transformers.AutoConfig.for_model(kind, **SIZES, **one)
    config.vocab_size = 11
    layers = transformers.AutoModel.from_config(config).double()
    layer = (layers.h if kind == "gpt2" else layers.layers)[0]
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.15)
    block = deq_from_layer(in_double(layer), grad=EXACT, **SOLVE)
    x, mask = trained(torch.randn(2, 5, 8)), torch.ones(2, 5, dtype=torch.long)
    mask[0, :padding] = 0
    loss = lambda: probe(block(x, mask if padding else None))  # noqa: E731
    assert_slopes(loss, {**by_kind(layer), "hidden_states": x})


def in_double(layer):
    """The layer with normalisations that do not go through float32 on their way, as Llama's do."""
    for parent in list(layer.modules()):
        for name, child in parent.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(len(child.weight), child.variance_epsilon)
                norm.weight = child.weight
                setattr(parent, name, norm)
    return layer
