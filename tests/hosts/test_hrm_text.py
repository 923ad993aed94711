"""Transformers' hierarchical recurrent model with its low-level gradient by name."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import deq_phantom_plugin as dpp
from conftest import load_example
from deq_phantom_plugin.hosts import registry as hosts
from host_cases import HrmTextCase

if HrmTextCase.missing:
    pytest.skip(HrmTextCase.missing, allow_module_level=True)

from transformers import AutoModelForCausalLM, HrmTextForCausalLM, Trainer, TrainingArguments

CASE = HrmTextCase()
IDS = torch.tensor([[1, 5, 3, 2, 7], [4, 4, 9, 10, 0]])


@pytest.fixture(autouse=True)
def _enabled():
    dpp.enable("hrm_text")


def make(grad=None, seed=0, **settings):
    torch.manual_seed(seed)
    model = HrmTextForCausalLM(CASE.config(**settings)).train()
    if grad is not None:
        model.set_grad(grad)
    return model


def gradients(model, **inputs):
    model.zero_grad()
    output = model(IDS, labels=IDS, **inputs)
    output.loss.backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    return output.loss.detach(), output.logits.detach(), torch.cat([g.flatten() for g in found])


@pytest.mark.parametrize("initial", [0.0, 0.3])
@pytest.mark.parametrize(
    ("h_cycles", "l_cycles", "l_bp", "grad"),
    [
        (2, 3, [2], ["upg(k=1, lam=1.0)", "upg(k=2, lam=1.0)"]),
        (2, 3, [2], ["jfb", "upg(k=2, lam=1.0)"]),
        (2, 3, [2], ["tbptt(k=1)", "tbptt(k=2)"]),
        (2, 2, [2, 2], "tbptt('all')"),
        (1, 4, [3], "upg(k=3, lam=1.0)"),
        (3, 3, [1, 2, 1], ["jfb", "upg(k=2, lam=1.0)", "jfb"]),
        (2, 2, [1, 1], "jfb"),
        (2, 2, [2, 2], "bptt(steps=2)"),
        (3, 1, [1], "bptt(steps=1)"),
    ],
)
def test_the_hand_written_truncation_is_a_strategy_bit_for_bit(
    h_cycles, l_cycles, l_bp, grad, initial
):
    settings = {"H_cycles": h_cycles, "L_cycles": l_cycles, "L_bp_cycles": l_bp}
    own, named = make(**settings), make(grad, **settings)
    for model in (own, named):
        model.model.z_L_init.data.fill_(initial)
    dpp.disable("hrm_text")
    expected = gradients(own)
    dpp.enable("hrm_text")
    for a, b in zip(gradients(named), expected, strict=True):
        assert torch.equal(a, b)
    host, seen = hosts._get("hrm_text"), []
    end = host.observe(own.model, seen.append)
    for a, b in zip(gradients(own), expected, strict=True):
        assert torch.equal(a, b)
    end()
    assert [solve.index for solve in seen] == list(range(h_cycles))


def test_a_function_as_a_strategy_is_not_written_to_the_config():
    def twice(func, equilibrium, context):
        return func(func(equilibrium))

    model = make("jfb")
    with pytest.warns(dpp.AssumptionWarning, match=r"cannot name.*config.grad='jfb\(\)'"):
        model.set_grad(twice)
    assert model.config.grad == "jfb()"
    assert not torch.equal(gradients(model)[2], gradients(make("jfb"))[2])


@pytest.mark.parametrize("grad", ["ift(max_iter=3, tol=0.5)", "jfb", "upg(k=2, lam=1.0)"])
def test_the_value_in_training_is_that_in_evaluation(grad):
    model = make(grad)
    trained = model(IDS).logits
    with torch.no_grad():
        torch.testing.assert_close(trained, model.eval()(IDS).logits)


def test_the_config_names_the_gradient_and_is_saved(tmp_path):
    model = make("npg(k=4, lam=0.6)")
    assert model.config.grad == "npg(k=4, lam=0.6)"
    expected = gradients(model)
    dpp.set_step(model, 7)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoModelForCausalLM.from_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").train()
    for a, b in zip(gradients(again), expected, strict=True):
        torch.testing.assert_close(a, b)
    dpp.disable("hrm_text")
    late = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").train()
    own = gradients(late)[2]
    dpp.enable("hrm_text")  # a model that was made before
    torch.testing.assert_close(gradients(late)[2], expected[2])
    assert not torch.allclose(own, expected[2])
    late.set_grad(None)
    assert late.config.grad is None
    torch.testing.assert_close(gradients(late)[2], own)
    listed = make(["jfb", "upg(k=2, lam=1.0)"])
    assert listed.config.grad == ["jfb()", "upg(k=2, lam=1.0, checkpoint=False)"]


def test_the_config_may_be_written_any_time():
    model = make("jfb")
    model.config.grad = "npg(k=4, lam=0.6)"
    assert torch.equal(gradients(model)[2], gradients(make("npg(k=4, lam=0.6)"))[2])
    model.config.grad = "npgg"
    with pytest.raises(ValueError, match="did you mean 'npg'"):
        gradients(model)
    model.config.grad = None
    assert torch.equal(gradients(model)[2], gradients(make())[2])


def test_a_monitor_logs_each_cycle_and_counts_steps():
    model, logged = make("npg(k=3, lam=0.5)"), []
    with dpp.monitor(model, lambda values, step: logged.append((step, set(values))), every=2):
        for _ in range(4):
            gradients(model)
    assert sorted(step for step, _ in logged) == [0, 0, 2, 2]
    names = {name.rpartition("/")[0] for _, values in logged for name in values}
    assert len(names) == 2
    assert any(name.endswith("#2") for name in names)


def test_bad_gradients_are_refused():
    model = make("jfb")
    with pytest.raises(ValueError, match=r"has 3 entries; expected one, or H_cycles=2"):
        model.set_grad(["jfb", "jfb", "jfb"])
    with pytest.raises(ValueError, match="did you mean 'upg'"):
        model.set_grad("ugp")
    with pytest.raises(ValueError, match="did you mean 'upg'"):
        HrmTextForCausalLM(CASE.config(grad="ugp"))
    assert model.config.grad == "jfb()"


def test_generation_and_caches_are_those_of_the_model():
    plain, named = make().eval(), make("upg(k=2, lam=0.5)").eval()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(plain.generate(IDS, **options), named.generate(IDS, **options))
    with torch.no_grad():
        cache = named(IDS, use_cache=True).cache
    assert cache.get_seq_length() == IDS.shape[1]
    with pytest.raises(ValueError, match="a cache in training"):
        named.train()(IDS, cache=cache)


def test_the_trainer_trains(tmp_path):
    data = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]

    def run(grad):
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            seed=0,
            disable_tqdm=True,
        )
        model = make(grad)
        Trainer(model=model, args=arguments, train_dataset=data).train()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    own = run(None)
    assert torch.equal(run(["jfb", "upg(k=2, lam=1.0)"]), own)
    assert not torch.allclose(run("npg(k=3, lam=0.5)"), own)


def test_gradient_checkpointing_of_the_layers():
    model = make("upg(k=2, lam=0.7)")
    expected = gradients(model)[2]
    # Its name until Transformers 5.24, which warns of it and drops it in 6.
    old = "gradient_checkpointing_enable"
    getattr(model, "activation_checkpointing_enable", getattr(model, old, None))()
    torch.testing.assert_close(gradients(model)[2], expected)


def test_two_threads_run_one_model_at_once():
    from concurrent.futures import ThreadPoolExecutor

    model = make("upg(k=2, lam=0.7)")
    rows = [torch.randint(11, (2, 6)) for _ in range(4)]
    expected = [model(ids, labels=ids).loss.item() for ids in rows]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda ids: model(ids, labels=ids).loss.item(), rows * 3))
    assert found == pytest.approx(expected * 3, rel=1e-6)


def test_a_report_of_the_model():
    model = make("npg(k=3, lam=0.5)", initializer_range=0.05)
    before = copy.deepcopy(model.state_dict())
    report = dpp.model_report(
        model,
        IDS,
        lambda output: torch.nn.functional.cross_entropy(
            output.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()
        ),
        grads=["jfb", "npg(k=3, lam=0.5)"],
    )
    assert "npg(k=3, lam=0.5)" in str(report)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_the_example_trains_every_gradient(capsys, tmp_path):
    example = load_example("train_hrm_text")
    text = tmp_path / "abc.txt"
    text.write_text("the cat sat on the mat. " * 60)
    sizes = ["--hidden", "16", "--length", "12", "--batch", "2", "--steps", "3"]
    same = ["own", "npg(k=3)", "ift(max_iter=4, tol=0.9)"]
    table = example.main(["--text", str(text), *sizes, "--grad", *same])
    rows = table.splitlines()[2:]
    assert [row.partition("  ")[0] for row in rows] == same
    numbers = [[float(cell) for cell in row.split()[-5:]] for row in rows]
    assert all(all(n > 0 for n in row) for row in numbers)
    with pytest.raises(SystemExit):
        example.main(["--grad", "ugp"])
    assert "did you mean 'upg'?" in capsys.readouterr().err
    text.write_text("short")
    with pytest.raises(SystemExit):
        example.main(["--text", str(text)])
    assert "the text has 5 characters" in capsys.readouterr().err


@pytest.mark.parametrize("spec", ["bptt", {"name": "bptt"}, ["bptt", "schedule({0: 'bptt'})"]])
def test_a_loop_of_another_length_is_backpropagated_as_a_whole(spec):
    model = make(spec)
    model.config.L_cycles = 5
    own = make(L_cycles=5, L_bp_cycles=[5, 5])  # its own code, with a graph of all evaluations
    own.load_state_dict(model.state_dict(), strict=False)
    dpp.disable("hrm_text")
    expected = gradients(own)
    dpp.enable("hrm_text")
    for a, b in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(a, b)
    again = make(L_cycles=5, grad=None)
    again.load_state_dict(model.state_dict(), strict=False)
    again.config.grad = model.config.grad
    torch.testing.assert_close(gradients(again)[2], expected[2])


class Twice(dpp.GradStrategy):
    """Not registered, so it has no text."""

    def attach(self, func, equilibrium, context):
        return func(func(equilibrium))


def test_a_strategy_without_a_text_stays_in_a_loop_of_another_length():
    model = make("jfb")
    with pytest.warns(dpp.AssumptionWarning, match="has no text that a config could save"):
        model.set_grad(Twice)
    before = gradients(model)[2]
    model.config.L_cycles = 4
    assert model.config.grad == "jfb()"
    assert gradients(model)[0] is not None
    model.config.L_cycles = 3
    assert torch.equal(gradients(model)[2], before)
    assert not torch.equal(gradients(make("jfb"))[2], before)


COLLECTED = {"output_hidden_states": True, "output_attentions": True}


@pytest.mark.parametrize("which", [True, [0, 2, 5]], ids=["all", "some"])
@pytest.mark.parametrize(
    "grad", ["tbptt(k=1)", "npg(k=3)", "ift", "jfb", "upg(k=3, lam=1.0)", "bptt", "guard('npg')"]
)
def test_collected_outputs_are_those_of_its_own_code(grad, which):
    asked = {**COLLECTED, "output_hidden_states": which}
    dpp.disable("hrm_text")
    own = make()(IDS, use_cache=False, **asked)
    dpp.enable("hrm_text")
    found = make(grad)(IDS, **asked)
    for name in ("hidden_states", "attentions"):
        a, b = getattr(found, name), getattr(own, name)
        assert len(a) == len(b)
        assert [each is None for each in a] == [each is None for each in b]
        for mine, theirs in zip(a, b, strict=True):
            if theirs is not None:
                torch.testing.assert_close(mine, theirs)
    assert any(each is None for each in found.hidden_states) == (which is not True)


def test_collected_outputs_beside_activation_checkpointing_and_a_report():
    model, own = make("ift"), make()
    dpp.disable("hrm_text")
    want = len(own(IDS, use_cache=False, **COLLECTED).attentions)
    dpp.enable("hrm_text")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    output = model(IDS, **COLLECTED)
    assert len(output.attentions) == want
    output.logits.square().sum().backward()
    assert len(output.attentions) == want
    seen = []
    with dpp.monitor(model, lambda values, step: seen.append(values), every=1):
        output = model(IDS, **COLLECTED)
        output.logits.square().sum().backward()
    assert seen
    assert len(output.attentions) == want
