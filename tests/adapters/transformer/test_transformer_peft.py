"""Adapters of PEFT in the DEQ transformer."""

from __future__ import annotations

import copy

import pytest
import torch

import deq_phantom_plugin as dpp
from conftest import evaluate

pytest.importorskip("torchdeq")
pytest.importorskip("transformers")
pytest.importorskip("peft", reason="PEFT is no dependency of the package: pip install peft")

import peft
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from deq_phantom_plugin.adapters.transformer import SetStep
from language_models import VOCAB, make, padded, tokens

TARGETS = ["inject", "qkv", "output", "up", "down"]


def adapted(model, seed=1, **settings):
    """Return a model with LoRA whose adapters are not the zeros that they begin with."""
    config = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": TARGETS, **settings}
    torch.manual_seed(seed)
    lora = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config))
    with torch.no_grad():
        for name, p in lora.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    return lora


def trained(model):
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def test_the_gradient_of_adapters_is_that_of_central_differences():
    lora = adapted(make(grad="ift(tol=1e-12, max_iter=200)"))
    ids, mask = padded(tokens(), 2)
    weight = torch.randn(2, 6, VOCAB, dtype=torch.float64) * mask[..., None]

    def loss():
        return (weight * lora(input_ids=ids, attention_mask=mask).logits).sum()

    loss().backward()
    names = {name.split(".lora")[0].split(".")[-1] for name, _ in trained(lora)}
    assert names == set(TARGETS)
    for name, p in trained(lora):
        direction = torch.randn_like(p)
        values = []
        for sign in (1e-5, -1e-5):
            with torch.no_grad():
                p.add_(direction, alpha=sign)
                values.append(loss().item())
                p.add_(direction, alpha=-sign)
        difference = (values[0] - values[1]) / 2e-5
        found = (p.grad * direction).sum().item()
        assert found == pytest.approx(difference, rel=1e-4, abs=1e-5), name


def test_dropout_of_adapters_keeps_its_masks_for_a_solve():
    lora = adapted(make(grad="npg"), lora_dropout=0.5)
    ids = tokens()
    first, second = lora(input_ids=ids), lora(input_ids=ids)
    assert (first.equilibrium_info.residual < 1e-8).all()
    assert not torch.allclose(first.logits, second.logits)
    again = [evaluate(lora, input_ids=ids).logits for _ in range(2)]
    assert torch.equal(*again)


def test_adapters_are_saved_loaded_and_merged(tmp_path):
    base = make(tight=False, f_tol=1e-6, f_solver="broyden", f_max_iter=60, grad="npg")
    lora = adapted(base, modules_to_save=["lm_head"])
    ids = tokens()
    lora(input_ids=ids, labels=ids).loss.backward()
    dpp.set_step(lora, 7)
    logits = evaluate(lora, input_ids=ids).logits
    lora.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert not any("grad_memory" in name for name in saved)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(evaluate(again, input_ids=ids).logits, logits)
    merged = lora.merge_and_unload()
    torch.testing.assert_close(evaluate(merged, ids).logits, logits, rtol=1e-3, atol=1e-4)
    assert type(merged) is type(base)


def test_what_finds_equilibria_finds_those_of_adapted_models():
    lora = adapted(make(tight=False))
    assert dpp.set_grad(lora, "npg(k=9)") == 1
    lora.set_grad("jfb")  # the model's own, which the config knows
    assert lora.config.grad == "jfb()"
    ids = tokens()
    logged = []
    with dpp.monitor(lora, lambda numbers, step: logged.append(numbers), every=1):
        lora(input_ids=ids, labels=ids).loss.backward()
    assert logged


def test_a_trainer_smooths_labels_of_adapted_models(tmp_path):
    lora = adapted(make(tight=False, grad="jfb", jac_reg_weight=1.0))
    ids = tokens()
    arguments = TrainingArguments(
        str(tmp_path), label_smoothing_factor=0.2, use_cpu=True, report_to=[]
    )
    trainer = Trainer(lora, arguments, callbacks=[SetStep()])
    torch.manual_seed(1)
    found = trainer.compute_loss(lora, {"input_ids": ids, "labels": ids})
    torch.manual_seed(1)
    out = lora(input_ids=ids)
    logp = out.logits[:, :-1].log_softmax(-1)
    nll = -logp.gather(-1, ids[:, 1:, None]).mean()
    torch.testing.assert_close(found, 0.8 * nll - 0.2 * logp.mean() + out.jac_loss)


def test_a_trainer_trains_adapters_alone_and_resumes(tmp_path):
    rows = (torch.arange(6) + torch.arange(40)[:, None]) % (VOCAB - 1) + 1
    data = [{"input_ids": row, "labels": row} for row in rows]
    losses = {}
    for resume in (False, True):
        torch.manual_seed(0)
        lora = adapted(make(tight=False, hidden_size=16, grad="npg"), lora_dropout=0.1)
        frozen = lora.base_model.model.model.block.qkv.base_layer.weight
        before = frozen.clone()
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=12,
            save_steps=6,
            logging_steps=1,
            learning_rate=2e-2,
            per_device_train_batch_size=8,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(lora, arguments, train_dataset=data, callbacks=[SetStep()])
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6") if resume else None)
        logs = (log for log in trainer.state.log_history if "loss" in log)
        losses[resume] = {log["step"]: log["loss"] for log in logs}
        assert torch.equal(frozen, before)
    assert losses[False][12] < losses[False][1]
    for step in range(7, 13):
        assert losses[True][step] == pytest.approx(losses[False][step], abs=1e-5)


@pytest.mark.parametrize("config", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_learned_prompts_have_the_gradient_of_the_equilibrium(config):
    settings = getattr(peft, config)(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(make(grad="ift(tol=1e-12, max_iter=200)"), settings).double()
    ids, mask = tokens(), torch.ones(2, 6, dtype=torch.long)
    weight = torch.randn(VOCAB, dtype=torch.float64)

    def loss():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return (weight * logits[:, -1]).sum()

    loss().backward()
    ((_, prompt),) = trained(model)
    direction = torch.randn_like(prompt)
    values = []
    for sign in (1e-5, -1e-5):
        with torch.no_grad():
            prompt.add_(direction, alpha=sign)
            values.append(loss().item())
            prompt.add_(direction, alpha=-sign)
    found = (prompt.grad * direction).sum().item()
    assert found == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-7)


def test_gradient_checkpointing_of_adapted_models_says_what_to_do():
    with pytest.raises(ValueError, match=r"upg\(checkpoint=True\)"):
        adapted(make(tight=False)).gradient_checkpointing_enable()
