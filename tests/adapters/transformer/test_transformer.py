from __future__ import annotations

import contextlib
import copy
import importlib
import json
import pickle
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import deq_phantom_plugin as dpp
from conftest import evaluate

pytest.importorskip("torchdeq")
pytest.importorskip("transformers")

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from deq_phantom_plugin.adapters.transformer import (
    DEQTransformerConfig,
    DEQTransformerForCausalLM,
    SetStep,
    deq_from_layer,
)
from deq_phantom_plugin.adapters.transformer.layer import CACHE
from language_models import TIGHT, VOCAB, gradients, loss_gradients, make, padded, solved, tokens

BOTH = pytest.mark.parametrize("pre", [False, True], ids=["post-LN", "pre-LN"])


# --- the block ---------------------------------------------------------------------------------


def plain_block(model, h, ids):
    """The block written out, one head after another."""
    block, config = model.model.block, model.config
    d, heads = config.hidden_size, config.num_attention_heads
    size, length = d // heads, ids.shape[1]

    def norm(x):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + config.layer_norm_eps).sqrt()

    def rotate(x):  # (B, L, size): pairs (i, i + size / 2) turn with the position
        angle = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, size, 2) / size)
        a, b = x[..., : size // 2], x[..., size // 2 :]
        cos, sin = angle.cos().to(x), angle.sin().to(x)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    injection = model.model.inject(norm(model.model.embed_tokens(ids)))
    x = norm(h) if config.pre_layer_norm else h
    q, k, v = (x @ block.qkv.weight.T + injection).split(d, dim=-1)
    outs = []
    for i in range(heads):
        part = slice(i * size, (i + 1) * size)
        scores = rotate(q[..., part]) @ rotate(k[..., part]).mT / size**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        outs.append(scores.softmax(-1) @ v[..., part])
    x = norm(block.output(torch.cat(outs, -1)) + h)
    x = x + block.down(block.up(x).relu())
    return x if config.pre_layer_norm else norm(x)


@BOTH
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_the_block_is_what_it_says(pre, implementation):
    model = make(pre_layer_norm=pre, attn_implementation=implementation).eval()
    ids = tokens()
    func, equilibrium = solved(model, ids)
    h = torch.randn_like(equilibrium)
    torch.testing.assert_close(func(h), plain_block(model, h, ids), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(func(equilibrium), equilibrium, rtol=0, atol=1e-10)
    logits = equilibrium @ model.model.embed_tokens.weight.T
    torch.testing.assert_close(model(ids).logits, logits)


@BOTH
@pytest.mark.parametrize("size", [64, 128])
def test_a_new_model_is_a_contraction(pre, size):
    settings = {"hidden_size": size, "intermediate_size": 4 * size, "num_attention_heads": 4}
    model = make(tight=False, pre_layer_norm=pre, vocab_size=65, **settings)
    ids = torch.randint(65, (4, 32))
    radius = model.spectral_radius(ids, tol=0.02)
    assert radius.shape == (4,)
    assert (radius < 0.95).all()
    info = model(ids).equilibrium_info
    assert (info.residual < 1e-3).all()
    assert info.nfe <= 25


@pytest.mark.parametrize("lam", [None, 0.5])
def test_spectral_radius_is_that_of_the_dense_jacobian(lam):
    model = make().eval()
    ids = tokens(1, 4)
    func, h = solved(model, ids)
    jacobian = torch.autograd.functional.jacobian(func, h).reshape(h.numel(), h.numel())
    if lam is not None:
        jacobian = lam * jacobian + (1 - lam) * torch.eye(h.numel())
    expected = torch.linalg.eigvals(jacobian).abs().max()
    radius = model.spectral_radius(ids, lam=lam, tol=1e-8, max_iter=2000)
    torch.testing.assert_close(radius, expected[None], rtol=1e-5, atol=0)


# --- gradients ---------------------------------------------------------------------------------


@BOTH
def test_every_strategy_against_backprop_through_the_iteration(pre):
    model = make(pre_layer_norm=pre)
    ids = tokens(2, 5)
    h = torch.zeros(2, 5, 8, dtype=torch.float64)
    for _ in range(300):
        h = plain_block(model, h, ids)
    model.zero_grad()
    logits = h @ model.model.embed_tokens.weight.T
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    found = {}
    for grad in ("exact", "ift(tol=1e-12, max_iter=200)", "upg(k=120)", "npg(k=120)", "bptt(300)"):
        assert dpp.set_grad(model, grad) == 1
        found[grad] = gradients(model, ids)
        error = (found[grad] - expected).norm() / expected.norm()
        print(grad, error.item())
        # The rotation is Transformers' own, which computes its angles in float32.
        assert error < 1e-5, grad
        assert (found[grad] - found["exact"]).norm() / expected.norm() < 1e-8, grad


def test_phantom_gradients_are_one():
    model = make(grad="upg(k=5, lam=0.7)")
    ids = tokens()
    upg = gradients(model, ids)
    model.set_grad("npg(k=5, lam=0.7)")
    torch.testing.assert_close(gradients(model, ids), upg, rtol=1e-8, atol=1e-11)
    model.set_grad("npg(k=1, lam=1.0)")
    npg = gradients(model, ids)
    model.set_grad("jfb")
    torch.testing.assert_close(gradients(model, ids), npg, rtol=1e-8, atol=1e-11)
    assert (npg - upg).norm() > 1e-3 * upg.norm()


def test_each_sample_is_solved_by_itself():
    model = make(grad="ift(tol=1e-12, max_iter=200)")
    ids = tokens(3)
    together = gradients(model, ids)
    apart = [gradients(model, ids[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, sum(apart) / 3, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("grad", ["upg", "npg", "ift(tol=1e-2)", "jfb", "bptt(steps=4)"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_dropout_and_padding_in_single_precision(grad, implementation):
    model = make(
        tight=False,
        grad=grad,
        dropout=0.1,
        attention_dropout=0.1,
        attn_implementation=implementation,
        jac_reg_weight=0.5,
    )
    ids, mask = padded(tokens(), 3)
    out = model(ids, attention_mask=mask, labels=ids)
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert out.equilibrium_info.residual.shape == (2,)
    assert out.equilibrium_info.nfe >= 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = make(tight=False, grad="npg", jac_reg_weight=0.1).to(dtype)
    ids = tokens()
    out = model(ids, labels=ids)
    assert out.logits.dtype == dtype
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_autocast():
    model = make(tight=False, grad="ift(tol=1e-1)", jac_reg_weight=0.1)
    ids = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_batch_is_learnt():
    model = make(tight=False, hidden_size=32, intermediate_size=64, grad="npg", jac_reg_weight=0.1)
    ids = tokens(4, 8)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# --- dropout -----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"dropout": 0.5}, {"attention_dropout": 0.5}])
def test_dropout_masks_last_for_one_solve(settings):
    model = make(tight=False, **settings)
    ids = tokens(3)
    torch.manual_seed(1)
    func, h = solved(model, ids)
    other, _ = solved(model, ids)
    h = torch.randn_like(h)
    torch.testing.assert_close(func(h), func(h), rtol=0, atol=0)
    assert not torch.allclose(func(h), other(h))
    model.eval()
    torch.testing.assert_close(solved(model, ids)[0](h), solved(model, ids)[0](h), rtol=0, atol=0)


def test_dropout_masks_keep_the_mean():
    model = make(tight=False, dropout=0.25, attention_dropout=0.25)
    keep = model.model.block.keep(torch.zeros(4000, 3, 8))
    shapes = {place: tuple(mask.shape[1:]) for place, mask in keep.items()}
    assert shapes == {
        "attention": (1, 8),
        "inner": (1, 16),
        "feed_forward": (1, 8),
        "value": (2, 3, 1),
    }
    for mask in keep.values():
        assert len(mask.unique()) == 2
        assert mask.mean().item() == pytest.approx(1, abs=0.02)
    assert model.eval().model.block.keep(torch.zeros(4, 3, 8)) == {}


def test_checkpointing_sees_its_own_masks():
    model = make(dropout=0.4, attention_dropout=0.2)
    ids = tokens()
    found = []
    for grad in ("upg", "upg(checkpoint=True)"):
        model.set_grad(grad)
        torch.manual_seed(3)
        found.append(gradients(model, ids))
    torch.testing.assert_close(*found)


# --- masks -------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(pre, implementation, side):
    model = make(pre_layer_norm=pre, attn_implementation=implementation, grad="npg")
    ids, mask = padded(tokens(2, 8), 3, side)
    alone = ids[:1, 3:] if side == "left" else ids[:1, :5]
    logits = model(ids, attention_mask=mask).logits[:1, mask[0] == 1]
    torch.testing.assert_close(logits, model(alone).logits, rtol=1e-6, atol=1e-6)
    # Labels at padding are left out, whether they say so or not.
    first = {"attention_mask": mask[:1]}
    torch.testing.assert_close(
        loss_gradients(model, ids[:1], **first), loss_gradients(model, alone), rtol=1e-6, atol=1e-6
    )
    loss = model(ids[:1], labels=ids[:1], **first).loss
    torch.testing.assert_close(loss, model(alone, labels=alone).loss, rtol=1e-6, atol=0)


@torch.no_grad()
def test_padding_does_not_count_in_the_stopping_rule():
    model = make(f_tol=1e-4, f_solver="fixed_point_iter").eval()
    ids, mask = padded(tokens(1, 12), 9)
    ours, alone = model(ids, attention_mask=mask), model(ids[:, 9:])
    assert ours.equilibrium_info.nfe == alone.equilibrium_info.nfe
    torch.testing.assert_close(
        ours.equilibrium_info.residual, alone.equilibrium_info.residual, rtol=1e-2, atol=0
    )
    func, state = solved(model, ids, attention_mask=mask)
    assert (state[:, :9] == 0).all()
    assert (func(torch.randn_like(state))[:, :9] == 0).all()


@torch.no_grad()
def test_later_tokens_are_not_seen():
    model = make().eval()
    ids = tokens(1, 8)
    changed = ids.clone()
    changed[0, 5] = ids[0, 5] % (VOCAB - 1) + 1
    a, b = model(ids).logits, model(changed).logits
    torch.testing.assert_close(a[:, :5], b[:, :5], rtol=0, atol=1e-9)
    assert (a[:, 5:] - b[:, 5:]).abs().amax(-1).min() > 1e-4


@torch.no_grad()
def test_positions_are_relative():
    model = make().eval()
    ids = tokens(1)
    positions = torch.arange(6)[None]
    torch.testing.assert_close(
        model(ids, position_ids=positions).logits,
        model(ids, position_ids=positions + 7).logits,
        rtol=1e-5,
        atol=1e-5,
    )
    stretched = model(ids, position_ids=3 * positions).logits
    assert not torch.allclose(model(ids).logits, stretched, atol=1e-4)


# --- the cache and generation ------------------------------------------------------------------


@BOTH
@torch.no_grad()
def test_cached_tokens_stay_at_equilibrium(pre):
    model = make(pre_layer_norm=pre).eval()
    ids, mask = padded(tokens(2, 9), 2)
    whole = model(ids, attention_mask=mask).logits
    cache, parts = None, []
    for begin, end in ((0, 4), (4, 5), (5, 9)):
        out = model(ids[:, begin:end], attention_mask=mask[:, :end], **{CACHE: cache})
        cache = out[CACHE]
        parts.append(out.logits)
    assert cache.get_seq_length() == 9
    torch.testing.assert_close(torch.cat(parts, 1)[mask == 1], whole[mask == 1], atol=1e-5, rtol=0)


def test_there_is_no_cache_in_training():
    model = make(tight=False)
    ids = tokens()
    assert CACHE not in model(ids)
    assert CACHE in evaluate(model, ids)
    assert CACHE not in evaluate(model, ids, use_cache=False)


@pytest.mark.numerics
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}])
@torch.no_grad()
def test_generation_with_left_padding_equals_that_without(options):
    model = make().eval()
    ids, mask = padded(tokens(2, 7), 3)
    settings = {"max_new_tokens": 6, "do_sample": False, **options}
    together = model.generate(ids, attention_mask=mask, **settings)[:, 7:]
    first = model.generate(ids[:1, 3:], **settings)[:, 4:]
    second = model.generate(ids[1:], **settings)[:, 7:]
    assert torch.equal(together, torch.cat([first, second]))
    assert together.shape == (2, 6)
    if "num_beams" not in options:  # greedy is the argmax, token by token
        for _ in range(6):
            ids = torch.cat([ids, model(ids[1:]).logits[:, -1:].argmax(-1).expand(2, 1)], 1)
        assert torch.equal(ids[1:, 7:], second)


@torch.no_grad()
def test_sampling():
    model = make(tight=False).eval()
    ids = tokens(1, 3)
    settings = {"max_new_tokens": 12, "do_sample": True, "num_return_sequences": 4}
    torch.manual_seed(5)
    first = model.generate(ids, **settings)
    torch.manual_seed(5)
    assert torch.equal(first, model.generate(ids, **settings))
    assert first.shape == (4, 15)
    assert len({tuple(row) for row in first.tolist()}) > 1


@torch.no_grad()
def test_generation_stops_at_the_end():
    model = make(tight=False).eval()
    ids = tokens(1)
    free = model.generate(ids, max_new_tokens=5, do_sample=False)[0, 6:]
    stopped = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=int(free[1]))
    assert len(stopped[0, 6:]) == free.tolist().index(free[1]) + 1


@torch.no_grad()
def test_some_logits():
    model = make(tight=False).eval()
    ids = tokens()
    whole = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, whole[:, -2:])
    torch.testing.assert_close(
        model(ids, logits_to_keep=torch.tensor([0, 3])).logits, whole[:, [0, 3]]
    )


# --- Jacobian regularisation -------------------------------------------------------------------


STRATEGIES = [
    "upg",
    "upg(checkpoint=True)",
    "npg",
    "jfb",
    "ift(tol=1e-2)",
    "bptt(steps=4)",
    "exact",
]


@pytest.mark.parametrize("grad", STRATEGIES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_regularisation_joins_the_loss(grad, implementation):
    model = make(grad=grad, jac_reg_weight=2.0, attn_implementation=implementation)
    ids = tokens()
    out = model(ids, labels=ids)
    assert out.jac_loss > 0
    model.model.config.jac_reg_weight = 0.0
    plain = model(ids, labels=ids)
    assert plain.jac_loss is None
    assert (out.loss - out.jac_loss).item() == pytest.approx(plain.loss.item(), rel=1e-6)
    model.zero_grad()
    out.jac_loss.backward()
    assert model.model.block.qkv.weight.grad.norm() > 0
    assert model.model.inject.weight.grad.norm() > 0


def test_its_gradient_is_that_of_the_frobenius_norm(monkeypatch):
    model = make(jac_reg_weight=1.0, grad="npg", attn_implementation="eager")
    ids = tokens(1, 3)
    func, h = solved(model, ids)
    weight = model.model.block.up.weight
    jacobian = torch.autograd.functional.jacobian(func, h, create_graph=True)
    (expected,) = torch.autograd.grad(jacobian.square().sum() / h.numel(), weight)
    # A probe for each unit vector is the exact norm: their squares sum to it.
    units = iter(torch.eye(h.numel(), dtype=h.dtype).view(-1, *h.shape))
    monkeypatch.setattr(torch, "randn_like", lambda like: next(units))
    total = sum(torch.autograd.grad(model(ids).jac_loss, weight)[0] for _ in range(h.numel()))
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("grad", ["upg(k=3)", "npg(k=3)", "jfb", "ift"])
def test_its_cost_is_one_evaluation_and_one_product(grad, monkeypatch):
    model = make(grad=grad)
    model.model.deq.grad_batch_dim = 0  # or the first pass asks
    ids = tokens()
    evaluations, products = [], []
    model.model.block.register_forward_hook(
        lambda *_: evaluations.append(1) if torch.is_grad_enabled() else None
    )
    original = torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *a, **k: products.append(1) or original(*a, **k)
    )
    counts = []
    for weight in (0.0, 1.0):
        model.model.config.jac_reg_weight = weight
        evaluations.clear()
        products.clear()
        out = model(ids, labels=ids)
        counts.append((len(evaluations), len(products)))
        out.loss.backward()
    assert counts[1][0] - counts[0][0] <= 1
    assert counts[1][1] - counts[0][1] == 1


def test_regularisation_is_for_training():
    model = make(tight=False, jac_reg_weight=1.0)
    ids = tokens()
    with torch.no_grad():
        assert model(ids, labels=ids).jac_loss is None
    with pytest.warns(dpp.AssumptionWarning, match="in evaluation mode"):
        assert model.eval()(ids, labels=ids).jac_loss is None


def test_regularisation_in_a_part_of_the_steps():
    model = make(tight=False, jac_reg_weight=1.0, jac_reg_freq=0.4, grad="jfb", f_max_iter=3)
    ids = tokens(1, 2)
    had = [model(ids).jac_loss is not None for _ in range(300)]
    assert sum(had) / 300 == pytest.approx(0.4, abs=0.09)


def test_regularisation_grows_with_the_step():
    model = make(jac_reg_weight=1.0, jac_reg_increment=0.5, jac_reg_interval=10)
    ids = tokens()
    found = []
    for step in (9, 10, 25):
        dpp.set_step(model, step)
        torch.manual_seed(0)
        found.append(model(ids, labels=ids).jac_loss.item())
    assert found[1] / found[0] == pytest.approx(1.5)
    assert found[2] / found[0] == pytest.approx(2.0)


def test_regularisation_is_of_tokens_not_of_padding(monkeypatch):
    def dense(func, h, n_samples):
        jacobian = torch.autograd.functional.jacobian(func, h)
        return jacobian.square().sum() / h.numel()

    monkeypatch.setattr("deq_phantom_plugin.regularization.jacobian_reg", dense)
    model = make(jac_reg_weight=1.0)
    ids, mask = padded(tokens(1, 6), 4)
    torch.testing.assert_close(
        model(ids, attention_mask=mask).jac_loss, model(ids[:, 4:]).jac_loss, rtol=1e-6, atol=0
    )


def test_accumulated_steps_weigh_it_by_their_labels():
    model = make(jac_reg_weight=1.0)
    ids = tokens(1, 6)
    found = []
    for items in (None, 20):
        torch.manual_seed(0)
        found.append(model(ids, labels=ids, num_items_in_batch=items))
    assert found[1].jac_loss.item() == pytest.approx(found[0].jac_loss.item() / 4)
    cross_entropy = [(out.loss - out.jac_loss).item() for out in found]
    assert cross_entropy[1] == pytest.approx(cross_entropy[0] / 4)  # five are predicted


# --- saving ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load(tmp_path, tied):
    model = make(
        tight=False,
        tie_word_embeddings=tied,
        pre_layer_norm=True,
        grad="npg(k=3, lam=0.6)",
        jac_reg_weight=2.0,
        jac_reg_freq=0.4,
        f_tol=1e-4,
        f_max_iter=17,
        f_solver="broyden",
    )
    ids = tokens()
    gradients(model, ids)
    dpp.set_step(model, 12)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "deq_transformer"
    assert (saved["grad"], saved["f_solver"]) == ("npg(k=3, lam=0.6)", "broyden")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is DEQTransformerForCausalLM
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert torch.equal(evaluate(model, ids).logits, evaluate(loaded, ids).logits)
    config = AutoConfig.from_pretrained(tmp_path)
    for name in ("pre_layer_norm", "grad", "f_solver", "f_max_iter", "f_tol", "jac_reg_freq"):
        assert getattr(config, name) == getattr(model.config, name), name
    assert repr(loaded.model.deq.produce_grad[0].strategy) == "npg(k=3, lam=0.6)"
    assert type(AutoModel.from_config(config)).__name__ == "DEQTransformerModel"


def test_set_grad_is_saved(tmp_path):
    model = make(tight=False)
    ids = tokens()
    before = gradients(model, ids)
    model.set_grad("npg(k=9)")
    assert model.config.grad == "npg(k=9, lam=0.5)"
    assert not torch.allclose(gradients(model, ids), before)
    model.set_grad(dpp.IFT(tol=1e-2))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.model.deq.produce_grad[0].strategy == dpp.IFT(tol=1e-2)
    with pytest.raises(ValueError, match="unknown strategy 'nope'"):
        model.set_grad("nope")
    with pytest.raises(ValueError, match=r"cannot be written in a config; dpp\.set_grad takes it"):
        model.set_grad(lambda func, equilibrium, context: func(equilibrium))
    assert model.model.deq.produce_grad[0].strategy == dpp.IFT(tol=1e-2)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_after_a_forward(copied):
    model = make(tight=False, dropout=0.1, jac_reg_weight=1.0)
    ids = tokens()
    with pytest.warns(dpp.AssumptionWarning, match="not through its Jacobian regulariser"):
        gradients(model, ids)
        twin = copied(model)
        assert torch.equal(evaluate(model, ids).logits, evaluate(twin, ids).logits)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert twin.lm_head.weight is not model.lm_head.weight


@torch.no_grad()
def test_resizing_the_vocabulary():
    model = make(tight=False).eval()
    ids = tokens()
    before = model(ids).logits
    model.resize_token_embeddings(VOCAB + 2)
    after = model(ids).logits
    assert after.shape[-1] == VOCAB + 2
    torch.testing.assert_close(after[..., :VOCAB], before)


# --- Trainer -----------------------------------------------------------------------------------


class Texts(torch.utils.data.Dataset):
    def __init__(self):
        self.ids = torch.randint(1, VOCAB, (64, 8), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


class Kill(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def train(folder, *callbacks, resume=False, steps=50, **settings):
    torch.manual_seed(0)
    model = make(
        tight=False,
        dropout=0.1,
        attention_dropout=0.1,
        f_max_iter=8,
        grad=f"schedule({{0: 'jfb', {steps // 2 + 5}: 'npg(lam=\"adaptive\")'}})",
        jac_reg_weight=0.5,
        jac_reg_freq=0.5,
        jac_reg_increment=0.1,
        jac_reg_interval=10,
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=steps // 2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Texts(),
        eval_dataset=Texts(),
        callbacks=[SetStep(), *callbacks],
    )
    with contextlib.suppress(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=resume or None)
    losses = {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}
    return trainer, losses


def test_a_killed_training_resumes_with_the_same_losses(tmp_path):
    _, whole = train(tmp_path / "whole")
    assert len(whole) == 50
    assert whole[50] < whole[1]
    _, first = train(tmp_path / "killed", Kill(40))
    assert max(first) < 41
    trainer, second = train(tmp_path / "killed", resume=True)
    assert len(trainer.state.log_history) >= 50
    for step in range(1, 51):  # the log of steps 1 to 25 comes from the checkpoint
        assert second[step] == pytest.approx(whole[step], abs=1e-6), step
    assert trainer.model.model.deq.grad_memory[0].step == 49


def test_trainer_evaluates_and_accumulates(tmp_path):
    trainer, losses = train(tmp_path, steps=4, gradient_accumulation_steps=2)
    assert len(losses) == 4
    metrics = trainer.evaluate()
    assert 0 < metrics["eval_loss"] < 10
    predictions = trainer.predict(Texts()).predictions
    assert predictions.shape == (64, 8, VOCAB)


# --- what finds equilibria ---------------------------------------------------------------------


def test_report_and_monitor():
    model = make(tight=False, f_tol=1e-6)
    ids = tokens()
    report = dpp.model_report(
        model, {"input_ids": ids, "labels": ids}, lambda out: out.loss, ["jfb", "npg(k=30)"]
    )
    text = str(report)
    assert "npg(k=30)" in text
    logged = []
    with dpp.monitor(model, lambda numbers, step: logged.append(numbers), every=1):
        model(ids, labels=ids).loss.backward()
    assert logged[0]["model.deq/cosine"] > 0.9
    assert 0 < logged[0]["model.deq/spectral_radius"] < 1.5


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grad": "nope"}, r"unknown strategy 'nope'; there are .*'ift'.*'npg'.*'upg'"),
        ({"grad": "npg(kk=3)"}, r"npg has no argument 'kk'.*it takes k"),
        ({"grad": 5}, "grad=5; expected a spec as a string"),
        ({"f_solver": "newton"}, "f_solver='newton'; expected one of anderson, anderson_fast, "),
        ({"f_max_iter": 2}, "f_max_iter=2; expected a whole number of at least 3 for anderson"),
        ({"f_max_iter": 2.5}, r"f_max_iter=2\.5"),
        ({"f_tol": -1.0}, r"f_tol=-1\.0; expected a number of at least 0 and below 1"),
        ({"hidden_size": 10, "num_attention_heads": 4}, "expected a multiple of twice the heads"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"hidden_act": "swoosh"}, "hidden_act='swoosh'; expected one of"),
        ({"dropout": 1.0}, r"dropout=1\.0; expected a probability"),
        ({"attention_dropout": -0.1}, r"attention_dropout=-0\.1"),
        ({"jac_reg_freq": 1.1}, r"jac_reg_freq=1\.1; expected a probability"),
        ({"jac_reg_weight": -2.0}, r"jac_reg_weight=-2\.0"),
        ({"jac_reg_increment": 0.1}, "without an interval"),
    ],
)
def test_a_config_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        DEQTransformerConfig(**settings)


@torch.no_grad()
def test_a_sequence_longer_than_the_limit():
    model = make(tight=False).eval()
    message = "a sequence of 33 tokens; expected at most 32, config.max_position_embeddings"
    with pytest.raises(ValueError, match=message):
        model(tokens(1, 33))
    cache = model(tokens(1, 32))[CACHE]
    with pytest.raises(ValueError, match=message):
        model(tokens(1, 1), **{CACHE: cache})
    assert model(tokens(1, 32)).logits.shape == (1, 32, VOCAB)


@pytest.mark.parametrize("shape", [(1, 0), (0, 3), (0, 0)])
@torch.no_grad()
def test_an_empty_prompt(shape):
    model = make(tight=False).eval()
    with pytest.raises(ValueError, match="expected at least one sequence of at least one token"):
        model(torch.zeros(shape, dtype=torch.long))


@torch.no_grad()
def test_a_cache_of_another_kind():
    model = make(tight=False).eval()
    with pytest.raises(ValueError, match="is a StaticCache; expected a DynamicCache"):
        model.generate(tokens(1), max_new_tokens=2, cache_implementation="static")


@torch.no_grad()
def test_generation_from_nothing():
    with pytest.raises(ValueError):  # noqa: PT011 -- Transformers' words or ours
        make(tight=False).eval().generate(torch.zeros((1, 0), dtype=torch.long), max_new_tokens=2)


def test_no_input_or_two():
    model = make(tight=False)
    with pytest.raises(ValueError, match="of input_ids and inputs_embeds"):
        model()
    ids = tokens()
    embeds = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="of input_ids and inputs_embeds"):
        model(ids, inputs_embeds=embeds)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(ids).logits)


def test_a_diverged_solve_says_so():
    model = make(tight=False)
    with torch.no_grad():
        model.model.block.qkv.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or Inf"):
        model(tokens())


# --- decoder layers of Transformers --------------------------------------------------------------


def layer_config(kind, **settings):
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "vocab_size": VOCAB}
    if kind == "gpt2":
        sizes = {"n_embd": 8, "n_head": 2, "vocab_size": VOCAB, "n_layer": 1}
        dropouts = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        return AutoConfig.for_model(kind, **{**sizes, **dropouts, **settings})
    sizes |= {"num_key_value_heads": 1, "intermediate_size": 16, "num_hidden_layers": 1}
    if kind == "qwen3":
        sizes["head_dim"] = 4
    if kind == "mistral":
        sizes["sliding_window"] = None
    return AutoConfig.for_model(kind, **{**sizes, **settings})


def decoder_layer(kind, **settings):
    model = AutoModel.from_config(layer_config(kind, **settings)).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.15)
    return model, (model.h if kind == "gpt2" else model.layers)[0]


KINDS = ["gpt2", "llama", "mistral", "qwen2", "qwen3"]


@pytest.mark.parametrize("kind", KINDS)
def test_equilibrium_of_a_decoder_layer(kind):
    model, layer = decoder_layer(kind)
    block = deq_from_layer(layer, grad="exact", **TIGHT)
    assert block.layer is layer
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    params = [x, *layer.parameters()]

    def plain(h):
        """The layer as its own model runs it, on the embeddings h + x."""
        caught = []
        handle = layer.register_forward_hook(lambda _, args, out: caught.append(out))
        inputs = h + x
        if kind == "gpt2":
            inputs = inputs - model.wpe.weight[:5]  # which the model adds
        model(inputs_embeds=inputs, use_cache=False)
        handle.remove()
        return F.layer_norm(caught[0], (8,))

    h = torch.zeros_like(x)
    for _ in range(150):
        h = plain(h)
    expected = torch.autograd.grad((weight * h).sum(), params)
    state = block(x)
    torch.testing.assert_close(state, h, rtol=1e-6, atol=1e-6)
    assert (block.last.residual < 1e-10).all()
    found = torch.autograd.grad((weight * state).sum(), params)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert dpp.set_grad(block, "npg(k=150)") == 1
    phantom = torch.autograd.grad((weight * block(x)).sum(), params)
    for ours, theirs in zip(phantom, found, strict=True):  # Llama normalises in float32
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_decoder_layers_with_padding(kind, implementation):
    _, layer = decoder_layer(kind, attn_implementation=implementation)
    block = deq_from_layer(layer, **TIGHT)
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    state = block(x, mask)
    assert (state[:, :2] == 0).all()
    torch.testing.assert_close(state[:, 2:], block(x[:, 2:]), rtol=1e-5, atol=1e-5)


def test_dropout_of_a_decoder_layer_is_fixed_in_a_solve():
    _, layer = decoder_layer("gpt2", resid_pdrop=0.4, attn_pdrop=0.4)
    block = deq_from_layer(layer.train(), grad="npg", **TIGHT)
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    state = block(x)
    assert (block.last.residual < 1e-8).all()  # with masks that change there is no equilibrium
    assert not torch.allclose(state, block(x))
    before = torch.get_rng_state()
    func = block.equilibrium_func(x)
    h = torch.randn_like(x)
    assert torch.equal(func(h), func(h))
    assert not torch.equal(before, torch.get_rng_state())  # the next solve has other masks
    assert torch.equal(evaluate(block, x), evaluate(block, x))


def test_a_bare_layer_is_enough():
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    block = deq_from_layer(LlamaDecoderLayer(layer_config("llama"), 0), grad="upg")
    x = torch.randn(2, 4, 8)
    block(x).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in block.parameters())
    copy.deepcopy(block)(x)


def test_layers_that_cannot_be():
    _, layer = decoder_layer("llama")
    known = "gpt2, llama, mistral, qwen2, qwen3"
    with pytest.raises(ValueError, match=f"layers of 'bert'; expected one of {known}"):
        deq_from_layer(layer, "bert")
    bert = AutoModel.from_config(
        AutoConfig.for_model(
            "bert", hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
        )
    )
    with pytest.raises(ValueError, match=f"layers of 'bert'; expected one of {known}"):
        deq_from_layer(bert.encoder.layer[0])
    with pytest.raises(ValueError, match=f"Linear holds no Transformers config.*{known}"):
        deq_from_layer(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="LlamaAttention is not a decoder layer of llama"):
        deq_from_layer(layer.self_attn)
    with pytest.raises(ValueError, match="unknown strategy 'nope'"):
        deq_from_layer(layer, grad="nope")
    with pytest.raises(ValueError, match=r"shape \(2, 0, 8\); expected \(batch, length, 8\)"):
        deq_from_layer(layer)(torch.zeros(2, 0, 8, dtype=torch.float64))


def test_without_transformers(monkeypatch):
    for name in ("transformers", "transformers.modeling_utils"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "deq_phantom_plugin.adapters.transformer")
    with pytest.raises(ImportError, match=r'pip install "deq-phantom-plugin\[text\]"'):
        importlib.import_module("deq_phantom_plugin.adapters.transformer")


def test_without_torchdeq(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdeq.solver", None)
    with pytest.raises(ImportError, match=r'pip install "deq-phantom-plugin\[text\]"'):
        DEQTransformerConfig()
