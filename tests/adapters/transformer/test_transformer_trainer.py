"""What Transformers' Trainer does with losses and labels, on a class that it has no name of."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import deq_phantom_plugin as dpp
from deq_phantom_plugin.contract.errors import AssumptionWarning
from deq_phantom_plugin.hosts import find_equilibria

pytest.importorskip("torchdeq")
pytest.importorskip("transformers")

from transformers import (
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
)

from deq_phantom_plugin.adapters.transformer import DEQTransformerForCausalLM, SetStep
from deq_phantom_plugin.adapters.transformer.jac_loss import by_sequence
from language_models import VOCAB, make, padded, tokens


class Named(DEQTransformerForCausalLM):
    """A subclass whose name tells nothing."""


def trainer_of(model, folder, **settings):
    options = {"train_dataset", "eval_dataset", "data_collator", "compute_loss_func", "callbacks"}
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{name: value for name, value in settings.items() if name not in options},
    )
    rest = {name: value for name, value in settings.items() if name in options}
    return Trainer(model, arguments, **rest)


def smoothed(logits, targets, epsilon):
    """(1 - epsilon) of the cross-entropy, and epsilon of that with the uniform distribution."""
    keep = targets != -100
    logp = logits[keep].log_softmax(-1)
    nll = -logp.gather(-1, targets[keep][:, None]).sum()
    return (1 - epsilon) * nll - epsilon * logp.mean(-1).sum()


# --- label smoothing ---------------------------------------------------------------------------


@pytest.mark.parametrize("items", [None, 40])
@pytest.mark.parametrize("kind", [DEQTransformerForCausalLM, Named])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_smoothed_labels_are_those_of_the_next_token(tmp_path, kind, items, weight):
    model = kind(make(tight=False, grad="jfb", jac_reg_weight=weight).config)
    ids = tokens()
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    trainer = trainer_of(model, tmp_path, label_smoothing_factor=0.2)
    torch.manual_seed(1)  # the same probe of the regulariser
    batch = {"input_ids": ids, "labels": labels}
    said = pytest.warns(AssumptionWarning, match="label smoothing the model does not see")
    with said if weight and items else contextlib.nullcontext():
        found, output = trainer.compute_loss(model, batch, True, num_items_in_batch=items)
    torch.manual_seed(1)
    expected = model(ids)
    targets = labels[:, 1:]
    n = (targets != -100).sum()
    loss = smoothed(expected.logits[:, :-1], targets, 0.2) / (items or n)
    if weight:
        assert expected.jac_loss > 0
        loss = loss + expected.jac_loss * (1 if items is None else n / items)
    torch.testing.assert_close(found, loss)
    assert torch.equal(output.logits, expected.logits)


def test_smoothing_of_other_models_is_their_own(tmp_path):
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        intermediate_size=8,
        num_attention_heads=2,
        num_hidden_layers=1,
    )
    model = LlamaForCausalLM(config)
    ids = tokens()
    trainer = trainer_of(model, tmp_path, label_smoothing_factor=0.2)
    found = trainer.compute_loss(model, {"input_ids": ids, "labels": ids})
    expected = smoothed(model(ids).logits[:, :-1], ids[:, 1:], 0.2) / 10
    torch.testing.assert_close(found, expected)


def test_smoothed_training_learns_the_next_token(tmp_path):
    """Every token is followed by the next number: copying would score none of them."""
    rows = (torch.arange(6) + torch.arange(40)[:, None]) % (VOCAB - 1) + 1
    data = [{"input_ids": row, "labels": row} for row in rows]
    model = make(tight=False, hidden_size=32, intermediate_size=32, grad="npg")
    trainer = trainer_of(
        model,
        tmp_path,
        label_smoothing_factor=0.1,
        train_dataset=data,
        max_steps=40,
        learning_rate=2e-2,
        per_device_train_batch_size=20,
        save_strategy="no",
    )
    trainer.train()
    with torch.no_grad():
        guess = model.eval()(rows).logits[:, :-1].argmax(-1)
    assert (guess == rows[:, 1:]).float().mean() > 0.9


# --- the regulariser ---------------------------------------------------------------------------


def dense(func, h, n_samples):
    """What the estimate of `jacobian_reg` is the mean of."""
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        jacobian = torch.autograd.functional.jacobian(func, h, create_graph=True)
    return jacobian.square().sum() / h.numel()


@pytest.fixture
def no_probes(monkeypatch):
    monkeypatch.setattr("deq_phantom_plugin.regularization.jacobian_reg", dense)


def unequal():
    """Rows with different numbers of labels, and of tokens."""
    ids, mask = padded(tokens(4, 5), 2, "right")
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, :4] = -100
    labels[2, 0] = -100
    return ids, mask, labels


@pytest.mark.parametrize("parts", [[1, 3], [2, 2], [1, 1, 1, 1]])
def test_parts_of_a_step_weigh_what_they_weigh_in_one_batch(no_probes, parts):
    model = make(grad="jfb", jac_reg_weight=3.0, hidden_size=4, intermediate_size=4)
    ids, mask, labels = unequal()
    items = (labels[:, 1:] != -100).sum()
    whole = model(ids, attention_mask=mask, labels=labels)
    found = [
        model(i, attention_mask=m, labels=t, num_items_in_batch=items)
        for i, m, t in zip(ids.split(parts), mask.split(parts), labels.split(parts), strict=True)
    ]
    for name in ("jac_loss", "loss"):
        total = sum(getattr(out, name) for out in found)
        torch.testing.assert_close(total, getattr(whole, name), rtol=1e-5, atol=0)
    # Each row counts by its labels, as in cross-entropy; padding is none of it.
    counts = (labels[:, 1:] != -100).sum(-1)
    rows = [model(i[None, : m.sum()]).jac_loss for i, m in zip(ids, mask, strict=True)]
    expected = sum(n * row for n, row in zip(counts, rows, strict=True)) / items
    torch.testing.assert_close(whole.jac_loss, expected, rtol=1e-5, atol=0)


def test_a_trainer_that_accumulates_takes_the_step_of_one_batch(no_probes, tmp_path):
    """With the Trainer's own count of labels."""
    settings = {"hidden_size": 4, "intermediate_size": 4, "f_solver": "broyden", "f_tol": 1e-6}
    start = make(tight=False, grad="jfb", jac_reg_weight=3.0, f_max_iter=60, **settings)
    columns = zip(*unequal(), strict=True)
    data = [
        dict(zip(("input_ids", "attention_mask", "labels"), row, strict=True)) for row in columns
    ]
    steps = []
    for size, weight in ((4, 3.0), (1, 3.0), (4, 0.0)):
        model = copy.deepcopy(start)
        model.config.jac_reg_weight = weight
        trainer_of(
            model,
            tmp_path,
            train_dataset=data,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            save_strategy="no",
        ).train()
        pairs = zip(model.parameters(), start.parameters(), strict=True)
        steps.append(torch.cat([(a - b).detach().flatten() for a, b in pairs]))
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-3, atol=1e-5)
    assert (steps[0] - steps[2]).norm() > 0.05 * steps[0].norm()  # the regulariser is in it


def cross_entropy_alone(outputs, labels, num_items_in_batch=None):
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch


def all_of_it(outputs, labels, num_items_in_batch=None):
    return cross_entropy_alone(outputs, labels, num_items_in_batch) + outputs.jac_loss


@pytest.mark.parametrize("loss", [None, all_of_it, cross_entropy_alone])
def test_a_loss_that_leaves_the_regulariser_out_is_told(tmp_path, loss):
    data = [{"input_ids": row, "labels": row} for row in tokens(8)]
    trainer = trainer_of(
        make(tight=False, grad="jfb", jac_reg_weight=1.0),
        tmp_path,
        train_dataset=data,
        max_steps=3,
        per_device_train_batch_size=2,
        compute_loss_func=loss,
        save_strategy="no",
    )
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        trainer.train()
    told = [w for w in given if w.category is AssumptionWarning]
    assert len(told) == (loss is cross_entropy_alone)
    assert all("Add output.jac_loss to a loss" in str(w.message) for w in told)


# --- whole runs --------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_packed_documents_are_trained_on_and_evaluated(tmp_path, bf16):
    lengths = torch.randint(3, 9, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    data = [{"input_ids": (torch.arange(n) % (VOCAB - 1) + 1).tolist()} for n in lengths]
    model = make(tight=False, hidden_size=16, grad="npg", jac_reg_weight=0.1, f_max_iter=8)
    trainer = trainer_of(
        model,
        tmp_path,
        bf16=bf16,
        train_dataset=data,
        eval_dataset=data[:4],
        data_collator=DataCollatorWithFlattening(return_tensors="pt"),
        callbacks=[SetStep()],
        max_steps=20,
        learning_rate=2e-2,
        per_device_train_batch_size=3,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        save_strategy="no",
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < 0.5 * before
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0]
    # Each document by itself is as good as in its row.
    model.eval()
    rows = [torch.tensor([d["input_ids"]]) for d in data[:4]]
    with torch.no_grad():
        alone = [model(r, labels=r).loss * (r.shape[1] - 1) for r in rows]
    mean = sum(alone) / sum(r.shape[1] - 1 for r in rows)
    assert after == pytest.approx(mean.item(), rel=0.15 if bf16 else 0.05)


@pytest.mark.numerics
@torch.no_grad()
def test_a_pipeline_generates(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCAB)}
    plain = Tokenizer(models.WordLevel(words, unk_token="w1"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="w0", padding_side="left", unk_token="w1"
    )
    # Steps of F itself find the same equilibrium of a token with a cache and without.
    model = make(f_solver="fixed_point_iter", f_max_iter=300, f_tol=1e-10).eval()
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    settings = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}
    together = generate(["w3 w4 w5 w6", "w7 w8"], batch_size=2, **settings)
    for text, found in zip(["w3 w4 w5 w6", "w7 w8"], together, strict=True):
        ids = torch.tensor([[words[w] for w in text.split()]])
        for _ in range(4):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        expected = [f"w{i}" for i in ids[0, -4:].tolist()]
        # Padding is a special token, which a pipeline does not show.
        shown = [w for w in expected if w != "w0"]
        assert found[0]["generated_text"].split() == shown


@pytest.mark.parametrize("return_dict", [True, False])
def test_smoothed_labels_are_of_the_next_token_in_tuples_too(tmp_path, return_dict):
    model = make(tight=False, grad="jfb", f_tol=1e-6, f_solver="broyden", f_max_iter=60)
    trainer = trainer_of(model, tmp_path, label_smoothing_factor=0.2)
    ids = tokens()
    inputs = {"input_ids": ids, "labels": ids, "return_dict": return_dict}
    with torch.no_grad():
        found = trainer.compute_loss(model.train(), inputs)
        logits = model(ids).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=0.2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def drawn(folder, stop=None, resume=None):
    """The k of each micro-batch of a training of 8 steps, and its losses."""
    torch.manual_seed(0)
    grad = "schedule({0: \"upg(k='uniform(1, 9)')\", 0.75: \"ramp('npg', {'k': (2, 6)})\"})"
    model, found = make(tight=False, grad=grad, f_max_iter=8), []
    ((host, deq),) = find_equilibria(model)
    host.observe(deq, lambda solve: found.append(solve.strategy.k))
    trainer = trainer_of(
        model,
        folder,
        train_dataset=[{"input_ids": ids, "labels": ids} for ids in tokens(32, 8)],
        callbacks=[SetStep(), *([] if stop is None else [Stop(stop)])],
        max_steps=8,
        save_steps=3,
        logging_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        seed=1,
    )
    trainer.train(resume_from_checkpoint=resume)
    losses = {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}
    return found, losses


def test_a_resumed_training_draws_as_one_that_was_not_stopped(tmp_path):
    """The Trainer tells the step, and the length that fractions of training are of."""
    whole, losses = drawn(tmp_path / "whole")
    assert len(whole) == 16
    assert whole[::2] == whole[1::2]  # one draw for all parts of a step
    assert len(set(whole[:12])) > 2
    assert whole[12:] == [5, 5, 5, 5]  # steps 6 and 7 of 8, from 2 to 6
    stopped, _ = drawn(tmp_path / "stopped", stop=5)
    assert stopped == whole[:10]
    resumed, again = drawn(tmp_path / "stopped", resume=str(tmp_path / "stopped" / "checkpoint-3"))
    assert resumed == whole[6:]
    assert again == pytest.approx(losses, abs=1e-6)


def report(model, batch):
    dpp.model_report(model, batch, lambda output: output.loss, ["jfb"], repeats=1)


def tuned(model, batch):
    dpp.tune(model, [batch], lambda output: output.loss)


def saliency(model, batch):
    output = model(**batch, output_hidden_states=True)
    torch.autograd.grad(output.loss, output.hidden_states[-1])


MEASURED = pytest.mark.parametrize("measure", [report, tuned, saliency])


def regularised(dropout):
    return make(
        tight=False, grad="jfb", jac_reg_weight=0.5, f_max_iter=60, f_tol=1e-5, dropout=dropout
    ).train()


@MEASURED
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_measurement_is_no_step_that_leaves_the_regulariser_out(measure, dropout):
    model, ids = regularised(dropout), tokens()
    batch = {"input_ids": ids, "labels": ids}
    with warnings.catch_warnings():
        warnings.simplefilter("error", AssumptionWarning)
        model(**batch).loss.backward()
        measure(model, batch)
        for _ in range(2):
            model(**batch).loss.backward()


@pytest.mark.parametrize("measure", [report, tuned])
def test_a_measurement_does_not_hide_that_the_regulariser_is_left_out(measure):
    model, ids = regularised(0.0), tokens()
    batch = {"input_ids": ids, "labels": ids}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model(ids).logits.square().sum().backward()
        measure(model, batch)
        assert not [w for w in said if "Jacobian regulariser" in str(w.message)]
        model(ids)
        assert [w for w in said if "not through its Jacobian regulariser" in str(w.message)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_sequences_count_up_to_a_factor(no_probes, dtype):
    model, ids = make(grad="jfb", jac_reg_weight=3.0, hidden_size=4, intermediate_size=4), tokens()
    first, second = (model(row[None]).jac_loss for row in ids)
    expected = 0.75 * first + 0.25 * second
    for factor in (1.0, 100.0, 0.25, 0.1, 1e-3):
        weights = torch.tensor([3.0, 1.0], dtype=dtype) * factor
        found = model(ids, jac_weights=weights).jac_loss
        rtol = 1e-5 if dtype == torch.float64 else 1e-2  # the weights themselves are rounded
        torch.testing.assert_close(found, expected, rtol=rtol, atol=0)
    none = model(ids, jac_weights=torch.zeros(2, dtype=dtype)).jac_loss
    assert none == 0
    none.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_model_of_16_bits_weighs_more_tokens_than_float16_counts_to():
    state = torch.ones(70, 1000, 1, dtype=torch.float16)
    scaled = by_sequence(lambda h: h, state, None, torch.full((70,), 1000))
    assert torch.equal(scaled(state), state)  # equal rows weigh what they weigh without weights


@pytest.mark.parametrize("bf16", [False, True])
def test_smoothed_labels_without_return_dict_in_a_trainer(tmp_path, bf16):
    data = [{"input_ids": row, "labels": row} for row in tokens(4)]
    losses = []
    for return_dict in (True, False):
        torch.manual_seed(0)
        model = make(tight=False, grad="jfb", jac_reg_weight=0.5, return_dict=return_dict)
        trainer = trainer_of(
            model,
            tmp_path,
            label_smoothing_factor=0.1,
            bf16=bf16,
            train_dataset=data,
            eval_dataset=data,
            max_steps=2,
            per_device_train_batch_size=4,
            save_strategy="no",
        )
        losses += [(trainer.train().training_loss, trainer.evaluate()["eval_loss"])]
    assert losses[0] == losses[1]


def test_a_rebuilt_tuple_is_of_its_new_values():
    model, ids = make(tight=False, grad="jfb", jac_reg_weight=0.5).train(), tokens()
    values = model(ids, return_dict=False)
    doubled = type(values)(2 * x if isinstance(x, torch.Tensor) else x for x in values)
    assert torch.equal(doubled.output.logits, 2 * values.output.logits)
    assert torch.equal(doubled.output.jac_loss, 2 * values.output.jac_loss)
    labelled = model(ids, labels=ids, return_dict=False)  # one value more
    assert torch.equal(labelled.output.loss, labelled[0])
    assert values.output.loss is None
    evaluated = model.eval()(ids[:1], use_cache=False, return_dict=False)
    detached = type(evaluated)(x.detach() if isinstance(x, torch.Tensor) else x for x in evaluated)
    again = pickle.loads(pickle.dumps(detached))
    assert type(again) is type(evaluated)
    assert torch.equal(again.output.logits, evaluated[0])
