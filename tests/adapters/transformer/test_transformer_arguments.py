"""What a causal model of Transformers is told acts or is refused: arguments and config."""

from __future__ import annotations

import copy
import inspect
import json

import pytest
import torch

import deq_phantom_plugin as dpp
from conftest import evaluate
from deq_phantom_plugin.contract.errors import AssumptionWarning

pytest.importorskip("torchdeq")
pytest.importorskip("transformers")

from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from deq_phantom_plugin.adapters.transformer import DEQTransformerConfig, DEQTransformerForCausalLM
from deq_phantom_plugin.adapters.transformer.layer import CACHE
from language_models import VOCAB, gradients, make, padded, solved, tokens

# --- labels ------------------------------------------------------------------------------------


def test_shift_labels_are_what_each_token_predicts():
    model = make()
    ids = tokens()
    targets = torch.randint(1, VOCAB, ids.shape).masked_fill(torch.rand(ids.shape) < 0.3, -100)
    logits = model(ids).logits.float()
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model(ids, labels=ids, shift_labels=targets).loss, expected)
    torch.testing.assert_close(model(ids, shift_labels=targets).loss, expected)
    ours = model(ids, shift_labels=F.pad(ids[:, 1:], (0, 1), value=-100)).loss
    torch.testing.assert_close(ours, model(ids, labels=ids).loss)


def test_shift_labels_of_padding_are_left_out():
    model = make()
    ids, mask = padded(tokens(1, 8), 3)
    nexts = ids.roll(-1, 1)
    nexts[0, -1] = -100
    loss = model(ids, attention_mask=mask, shift_labels=nexts).loss
    alone = model(ids[:, 3:], labels=ids[:, 3:]).loss
    torch.testing.assert_close(loss, alone, rtol=1e-6, atol=1e-6)


# --- hidden states and attentions --------------------------------------------------------------


@torch.no_grad()
def test_hidden_states_by_argument_and_by_config():
    ids = tokens()
    model = make(tight=False).eval()
    assert model(ids).hidden_states is None
    found = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(found[0], model.get_input_embeddings()(ids))
    assert torch.equal(model.lm_head(found[1]), model(ids).logits)
    model.config.output_hidden_states = True
    again = model(ids).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert model(ids, output_hidden_states=False).hidden_states is None
    last = model(ids, output_hidden_states=-1).hidden_states
    assert last[0] is None
    assert torch.equal(last[1], found[1])


@torch.no_grad()
def test_attentions_are_those_at_the_equilibrium():
    model = make(attn_implementation="eager").eval()
    ids, mask = padded(tokens(2, 6), 2)
    out = model(ids, attention_mask=mask, output_attentions=True)
    _, h = solved(model, ids, attention_mask=mask)
    base = model.model
    injection = base.inject(base.block.norm(base.embed_tokens(ids)))
    qkv = (base.block.qkv(h) + injection).unflatten(-1, (3, 2, 4))
    q, k = (qkv[:, :, i].transpose(1, 2) for i in (0, 1))
    angle = torch.arange(6)[:, None] * 10000.0 ** (-torch.arange(0, 4, 2) / 4)

    def rotate(x):
        pair = torch.complex(x[..., :2], x[..., 2:]) * torch.polar(torch.ones(6, 2), angle)
        return torch.cat([pair.real, pair.imag], dim=-1)

    scores = rotate(q) @ rotate(k).mT / 2
    keep = torch.ones(6, 6).tril().bool() & mask[:, None, None].bool()
    expected = scores.masked_fill(~keep, -torch.inf).softmax(-1)
    (found,) = out.attentions
    real = mask[:, None, :, None].bool()
    torch.testing.assert_close(
        found.where(real, 0), expected.where(real, 0).double(), rtol=1e-5, atol=1e-6
    )
    cache = model(ids[:, :4], attention_mask=mask[:, :4])[CACHE]
    rest = model(ids[:, 4:], attention_mask=mask, output_attentions=True, **{CACHE: cache})
    torch.testing.assert_close(rest.attentions[0], found[:, :, 4:], rtol=1e-5, atol=1e-6)


def test_a_loss_on_attentions_has_the_gradient_of_the_equilibrium():
    model = make(attn_implementation="eager", grad="ift(tol=1e-12, max_iter=200)")
    ids = tokens(1, 4)
    weight = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    parameter = model.model.block.down.weight  # acts through the state alone

    def loss():
        return (weight * model(ids, output_attentions=True).attentions[0]).sum()

    (found,) = torch.autograd.grad(loss(), parameter)
    direction = torch.randn_like(parameter)
    values = []
    for sign in (1e-5, -1e-5):
        with torch.no_grad():
            parameter.add_(direction, alpha=sign)
            values.append(loss().item())
            parameter.add_(direction, alpha=-sign)
    difference = (values[0] - values[1]) / 2e-5
    assert (found * direction).sum().item() == pytest.approx(difference, rel=1e-4)


@torch.no_grad()
def test_attentions_need_an_implementation_that_tells():
    model = make(tight=False).eval()
    message = r"attn_implementation='sdpa'.*model\.set_attn_implementation\('eager'\)"
    with pytest.raises(ValueError, match=message):
        model(tokens(), output_attentions=True)
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    assert model(tokens()).attentions[0].shape == (2, 2, 6, 6)


def test_hidden_states_retain_their_gradient():
    model = make(tight=False, output_hidden_states=True, grad="npg")
    out = model(tokens())
    for state in out.hidden_states:
        state.retain_grad()
    out.logits[0, 0, 1].backward()
    assert all(state.grad.abs().sum() > 0 for state in out.hidden_states)


@pytest.mark.parametrize("how", ["argument", "config"])
@torch.no_grad()
def test_tuples(how):
    model = make(tight=False).eval()
    ids = tokens()
    expected = model(ids, labels=ids)
    if how == "config":
        model.config.return_dict = False
        found = model(ids, labels=ids)
    else:
        found = model(ids, labels=ids, return_dict=False)
    assert isinstance(found, tuple)
    assert torch.equal(found[0], expected.loss)
    assert torch.equal(found[1], expected.logits)


@pytest.mark.numerics
@torch.no_grad()
def test_assisted_generation_tells_attentions_and_hidden_states():
    model = make(attn_implementation="eager").eval()
    assistant = make(attn_implementation="eager").eval()
    ids = tokens(1)
    settings = {"max_new_tokens": 5, "do_sample": False}
    out = model.generate(
        ids,
        assistant_model=assistant,
        output_attentions=True,
        output_hidden_states=True,
        return_dict_in_generate=True,
        **settings,
    )
    assert torch.equal(out.sequences, model.generate(ids, **settings))
    shapes = [tuple(step[0].shape) for step in out.attentions]
    assert shapes == [(1, 2, 6, 6), *((1, 2, 1, n) for n in range(7, 11))]
    assert [step[1].shape[1] for step in out.hidden_states] == [6, 1, 1, 1, 1]


# --- arguments that others pass ----------------------------------------------------------------


@torch.no_grad()
def test_arguments_without_effect():
    model = make(tight=False).eval()
    ids = tokens()
    expected = model(ids).logits
    found = model(
        ids,
        cache_position=torch.arange(6),
        max_length_q=6,
        is_causal=True,
        output_router_logits=False,
        token_type_ids=torch.zeros_like(ids),
        anything=None,
    )
    assert torch.equal(found.logits, expected)
    assert torch.equal(
        model.model(ids, num_items_in_batch=3).last_hidden_state,
        model.model(ids).last_hidden_state,
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"attention_masks": 1}, TypeError, "'attention_masks'; expected input_ids, attention_m"),
        ({"num_logits_to_keep": 1}, TypeError, "another name now: logits_to_keep"),
        ({"is_causal": False}, ValueError, "is_causal=False; expected True"),
        ({"output_router_logits": True}, ValueError, "there is no router"),
        ({"token_type_ids": torch.ones(2, 6)}, ValueError, "tokens have no types"),
    ],
)
def test_arguments_that_cannot_act_are_refused(arguments, error, message):
    for model in (make(tight=False), make(tight=False).model):
        with pytest.raises(error, match=message):
            model(tokens(), **arguments)


def test_who_gives_an_unknown_argument_is_told_all_that_act():
    model = make(tight=False)
    acting = [name for name in inspect.signature(model.forward).parameters if name != "kwargs"]
    acting += ["shift_labels", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"]
    with pytest.raises(TypeError, match=f"'anything'; expected {', '.join(acting)}$"):
        model(tokens(), anything=1)


@pytest.mark.parametrize(
    "enable", ["gradient_checkpointing_enable", "activation_checkpointing_enable"]
)
def test_gradient_checkpointing_says_what_to_do_instead(enable):
    model = make(tight=False)
    if not hasattr(model, enable):
        pytest.skip("this Transformers has one name for it")
    with pytest.raises(ValueError, match=r"model\.set_grad\('upg\(checkpoint=True\)'\)"):
        getattr(model, enable)()


@pytest.mark.slow
def test_a_compiled_model_has_the_same_numbers():
    model = make(tight=False, grad="npg")
    ids, mask = padded(tokens(2, 6), 2)
    found = []
    for call in (model, torch.compile(model)):
        model.zero_grad()
        out = call(ids, attention_mask=mask, labels=ids)
        out.loss.backward()
        found.append([out.loss, *(p.grad.clone() for p in model.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


# --- positions ---------------------------------------------------------------------------------


SCALED = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {"factor": 4.0, "short_factor": [1.0, 1.0], "long_factor": [2.0, 3.0]},
}


@pytest.mark.parametrize("kind", SCALED)
@torch.no_grad()
def test_scaled_positions_reach_as_far_as_their_factor(kind):
    rope = {"rope_type": kind, "rope_theta": 10000.0, **SCALED[kind]}
    model = make(rope_parameters=dict(rope), hidden_size=8).eval()
    ids = tokens(1, 128)
    long = model(ids).logits
    with pytest.raises(ValueError, match="129 tokens; expected at most 128"):
        model(tokens(1, 129))
    # The rotation is Llama's, and it acts.
    config = LlamaConfig(
        hidden_size=8,
        num_attention_heads=2,
        max_position_embeddings=32,
        rope_parameters=dict(rope),
    )
    for length in (128, 20):
        ours = model.model.rotary_emb(torch.zeros(1), torch.arange(length)[None])
        theirs = LlamaRotaryEmbedding(config)
        theirs(torch.zeros(1), torch.arange(128)[None])
        expected = theirs(torch.zeros(1), torch.arange(length)[None])
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b)
    torch.manual_seed(0)
    plain = make(max_position_embeddings=128, hidden_size=8).eval()
    plain.load_state_dict(model.state_dict())
    assert (plain(ids).logits - long).abs().max() > 1e-3


@torch.no_grad()
def test_positions_written_into_the_config_act(tmp_path):
    model = make().eval()
    ids = tokens(1, 40)
    with pytest.raises(ValueError, match="expected at most 32"):
        model(ids)
    model.config.rope_parameters = {"rope_type": "linear", "factor": 2.0}
    found = model(ids).logits
    half = make(max_position_embeddings=64).eval()
    half.load_state_dict(model.state_dict())
    expected = half(ids, position_ids=torch.arange(40)[None] / 2).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, found)
    model.config.rope_parameters = None
    model.config.max_position_embeddings = 40
    assert (model(ids).logits - found).abs().max() > 1e-3


# --- the config --------------------------------------------------------------------------------


def test_a_gradient_written_into_the_config_acts_and_is_saved(tmp_path):
    model = make(grad="jfb")
    ids = tokens()
    before = gradients(model, ids)
    model.config.grad = "npg(k=9)"
    found = gradients(model, ids)
    twin = copy.deepcopy(model)
    twin.set_grad("jfb")
    torch.testing.assert_close(gradients(twin, ids), before)
    dpp.set_grad(twin, "npg(k=9)")
    torch.testing.assert_close(gradients(twin, ids), found)
    assert (found - before).norm() > 1e-3 * before.norm()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["grad"] == "npg(k=9)"


def test_a_gradient_set_from_outside_stays_and_is_saved(tmp_path):
    config = make(tight=False, grad="jfb").config
    model, other = DEQTransformerForCausalLM(config), DEQTransformerForCausalLM(config)
    dpp.set_grad(model, "npg(k=9)")
    ids = tokens()
    gradients(model, ids)
    gradients(other, ids)
    assert model.model.deq.produce_grad[0].strategy == dpp.NPG(k=9)
    assert other.model.deq.produce_grad[0].strategy == dpp.JFB()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.model.deq.produce_grad[0].strategy == dpp.NPG(k=9)
    dpp.set_grad(model, lambda func, equilibrium, context: func(equilibrium))
    with pytest.warns(AssumptionWarning, match=r"cannot be written in a config.*grad='jfb'"):
        model.save_pretrained(tmp_path)


def test_a_solver_written_into_the_config_acts_and_is_saved(tmp_path):
    model = make(tight=False, f_tol=1e-1, f_solver="anderson")
    ids = tokens()
    dpp.set_step(model, 5)
    few = model(ids).equilibrium_info
    model.config.f_tol = 1e-4
    more = model(ids).equilibrium_info
    assert more.nfe > few.nfe
    assert (more.residual < 1e-4).all()
    model.config.f_max_iter = 3
    assert model(ids).equilibrium_info.nfe < more.nfe
    assert evaluate(model, ids).equilibrium_info.nfe < more.nfe
    model.config.f_solver, model.config.f_max_iter = "fixed_point_iter", 2
    assert model.train()(ids).equilibrium_info.nfe <= 4
    assert model.model.deq.grad_memory[0].step == 5
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded(ids).equilibrium_info.nfe == model(ids).equilibrium_info.nfe


def test_what_is_read_at_each_forward():
    model = make(tight=False)
    ids = tokens()
    plain = model(ids).logits
    model.config.dropout = 0.5
    assert not torch.allclose(model(ids).logits, plain)
    model.config.dropout, model.config.attention_dropout = 0.0, 0.5
    assert not torch.allclose(model(ids).logits, plain)
    model.config.attention_dropout = 0.0
    assert torch.equal(model(ids).logits, plain)
    model.config.jac_reg_weight = 1.0
    assert model(ids).jac_loss > 0
    model.config.use_cache = False
    assert CACHE not in evaluate(model, ids)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", 16),
        ("intermediate_size", 8),
        ("num_attention_heads", 1),
        ("hidden_act", "gelu"),
        ("layer_norm_eps", 1e-3),
        ("vocab_size", 40),
    ],
)
def test_what_a_model_was_made_with_is_refused_later(name, value, tmp_path):
    model = make(tight=False)
    setattr(model.config, name, value)
    for call in (lambda: model(tokens()), lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match=rf"config\.{name}={value!r}"):
            call()
    DEQTransformerForCausalLM(model.config)(tokens())  # a new model has it


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("grad", "nope"),
        ("grad", None),
        ("f_solver", "newton"),
        ("f_max_iter", 0),
        ("f_tol", "small"),
        ("dropout", 1.5),
        ("hidden_act", "swoosh"),
        ("hidden_size", 0),
        ("jac_reg_weight", -1.0),
        ("jac_reg_freq", 2),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_written(name, value):
    config = make(tight=False).config
    before = getattr(config, name)
    with pytest.raises(ValueError):  # noqa: PT011 -- the messages are tested with the config
        setattr(config, name, value)
    assert getattr(config, name) == before


def test_what_does_not_fit_together_is_refused_at_the_next_forward():
    model = make(tight=False)
    model.config.jac_reg_increment = 0.5
    with pytest.raises(ValueError, match=r"jac_reg_increment=0\.5 without an interval"):
        model(tokens())
    model.config.jac_reg_interval = 5
    dpp.set_step(model, 0)
    model.config.f_max_iter = 2
    with pytest.raises(ValueError, match="at least 3 for anderson"):
        model(tokens())
    model.config.f_solver = "fixed_point_iter"
    model(tokens())


@torch.no_grad()
def test_an_attention_that_does_not_exist():
    model = make(tight=False).eval()
    for name in ("nope", "flash_attention_2"):
        model.config._attn_implementation = name
        with pytest.raises(ValueError, match=f"attn_implementation='{name}'; expected sdpa"):
            model(tokens())


def test_a_config_is_read_back_as_it_was(tmp_path):
    config = DEQTransformerConfig(vocab_size=9, hidden_size=8, num_attention_heads=2)
    config.save_pretrained(tmp_path)
    assert DEQTransformerConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_the_last_who_says_which_gradient_is_heard():
    model = make(tight=False, grad="upg").train()
    dpp.set_grad(model, "npg(k=3)", in_eval=True)
    model(tokens())
    assert model.model.acting_grad() == "npg(k=3)" or "k=3" in model.model.acting_grad()
    model.config.grad, model.config.grad_in_eval = "upg", False  # as they were
    model(tokens())
    assert model.model.acting_grad() == "upg"
    assert not model.model.deq.grad_in_eval
    assert "_writes" not in model.config.to_dict()
    dpp.set_grad(model, "jfb")
    model(tokens())
    assert model.model.acting_grad().startswith("jfb")


def test_saving_a_model_leaves_those_that_share_its_config_alone(tmp_path):
    config = make(tight=False).config
    saved, other = DEQTransformerForCausalLM(config), DEQTransformerForCausalLM(config)
    ids = tokens()
    dpp.set_grad(other, "ift", in_eval=True)
    dpp.set_grad(saved, "jfb")
    for _ in range(2):
        evaluate(other, ids)
        saved.save_pretrained(tmp_path)
        evaluate(other, ids)
        assert other.model.deq.produce_grad[0].strategy == dpp.IFT()
        assert other.model.deq.grad_in_eval
    assert (config.grad, config.grad_in_eval) == ("upg", False)
    assert json.loads((tmp_path / "config.json").read_text())["grad"] == "jfb()"
    assert not any("write" in key for key in config.to_dict())
    config.grad = "npg"  # a real write acts on both
    for model in (saved, other):
        evaluate(model, ids)
        assert model.model.deq.produce_grad[0].strategy == dpp.NPG()


def test_a_written_setting_leaves_the_other_one_as_it_was_set():
    model, ids = make(tight=False).eval(), tokens()
    dpp.set_grad(model, "ift", in_eval=True)
    model.config.grad = "jfb"
    assert model(ids).logits.grad_fn is not None
    assert model(ids, output_hidden_states=True).hidden_states[-1].requires_grad
    assert model.model.deq.produce_grad[0].strategy == dpp.JFB()
    dpp.set_grad(model, "ift")
    model.config.grad_in_eval = False
    with torch.no_grad():
        model(ids)
    assert not model.model.deq.grad_in_eval
    assert model.model.deq.produce_grad[0].strategy == dpp.IFT()
