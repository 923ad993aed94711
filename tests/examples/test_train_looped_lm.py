"""examples/train_looped_lm.py and its model: loops, methods, resuming, what is measured."""

from __future__ import annotations

import csv
import importlib
import json
import math
import sys

import pytest
import torch
from torch.nn import functional as F

import deq_phantom_plugin as dpp
from conftest import ROOT

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM

FOLDER = ROOT / "examples"


@pytest.fixture(scope="module", autouse=True)
def _on_path():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def example(_on_path):
    return importlib.import_module("train_looped_lm")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "abc.txt"
    path.write_text("the cat sat on the mat. " * 60, encoding="utf-8")
    return path


@pytest.fixture
def argv(text, tmp_path, monkeypatch):
    language = importlib.import_module("language")
    monkeypatch.setattr(language, "POINTS", 2)
    monkeypatch.setattr(language, "ROUNDS", 1)
    sizes = ["--hidden", "16", "--heads", "2", "--length", "12", "--batch", "4", "--loops", "3"]
    steps = ["--steps", "8", "--eval-every", "2", "--eval-sequences", "4", "--seeds", "0"]
    tested = ["--test-loops", "1", "3", "6"]
    return ["--text", str(text), *sizes, *steps, *tested, "--out", str(tmp_path / "out")]


def a_model(example, grad="tbptt(k=2)", steps=4, **config):
    torch.manual_seed(0)
    config = {"vocab_size": 7, "hidden_size": 16, "intermediate_size": 32, **config}
    made = example.LoopedConfig(num_attention_heads=2, steps=steps, grad=grad, **config)
    return example.LoopedForCausalLM(made).double()


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def by_hand(model, ids, steps, last):
    """The loss of a loop written out, of which the last evaluations carry a graph."""
    func, h = model.recurrence(ids)
    for i in range(steps):
        with torch.set_grad_enabled(i >= steps - last):
            h = func(h)
    positions = model.rotary_emb(h, torch.arange(h.shape[1])[None])
    for layer in model.coda:
        h = layer(h, position_embeddings=positions)
    logits = model.lm_head(model.coda_norm(h))
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


# --- the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("grad", "last"), [("tbptt(k=2)", 2), ("tbptt('all')", 4)])
@pytest.mark.parametrize("block_norm", [False, True])
def test_the_gradient_is_that_of_the_loop_written_out(example, grad, last, block_norm):
    model = a_model(example, grad, block_norm=block_norm).train()
    ids = torch.randint(7, (3, 6))
    loss = model(ids, labels=ids).loss
    loss.backward()
    found = gradients(model)
    model.zero_grad()
    expected = by_hand(model, ids, 4, last)
    expected.backward()
    # Transformers casts logits to float32 for its loss.
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for name, p in model.named_parameters():
        assert torch.allclose(found[name], p.grad, atol=1e-5), name
        assert p.grad.abs().max() > 1e-4, name


def test_a_token_does_not_see_later_ones(example):
    model = a_model(example).eval()
    ids = torch.randint(7, (2, 6))
    other = ids.clone()
    other[:, 4] = (other[:, 4] + 1) % 7
    with torch.no_grad():
        before, after = model(ids).logits, model(other).logits
    assert torch.allclose(before[:, :4], after[:, :4], atol=1e-12)
    assert not torch.allclose(before[:, 4:], after[:, 4:], atol=1e-3)


def test_another_number_of_loops(example):
    model = a_model(example).eval()
    ids = torch.randint(7, (2, 6))
    with torch.no_grad(), example.loops(model, 9):
        found = model(ids, labels=ids).loss
    assert found.item() == pytest.approx(by_hand(model, ids, 9, 9).item(), abs=1e-5)
    assert model.equilibrium.steps == 4


def test_saved_and_loaded(example, tmp_path):
    model = a_model(example, "npg(k=3)", "poisson(5)", block_norm=True).eval()
    dpp.set_step(model, 3)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).double()
    ids = torch.randint(7, (2, 6))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.config.grad == "npg(k=3)"
    assert str(loaded.equilibrium.steps) == "poisson(5.0)"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps=0; expected a whole number of at least 1"),
        ({"steps": "poison(8)"}, "no distribution 'poison'"),
        ({"grad": "nope"}, "unknown strategy 'nope'"),
        ({"num_attention_heads": 3}, "hidden_size=64 with num_attention_heads=3"),
    ],
)
def test_bad_configs(example, wrong, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        example.LoopedConfig(**wrong)


# --- training ------------------------------------------------------------------------------------


def test_methods(example):
    assert example.parse_method("upg", "poisson(4)") == ("upg", "poisson(4)")
    assert example.parse_method("upg", "8") == ("upg", 8)
    assert example.parse_method("upg(k=2)@5", "8") == ("upg(k=2)", 5)
    random = example.METHODS[2]
    assert example.parse_method(random, "8") == (
        "tbptt(k=4)",
        "lognormal_poisson(mean=8, sigma=0.5)",
    )


@pytest.mark.filterwarnings("ignore:h is no equilibrium")  # after so few evaluations
def test_results(example, argv, tmp_path, capsys):
    methods = ["tbptt(k=2)", "ift@uniform(1, 5)", "ramp('tbptt', {'k': (1, 3)}, until=0.5)"]
    steps = ["--steps", "20", "--eval-every", "10", "--lr", "1e-2", "--seeds", "0", "1"]
    runs = example.main([*argv, *steps, "--methods", *methods])
    out = tmp_path / "out"
    assert [(run.method, run.seed) for run in runs] == [(m, s) for s in (0, 1) for m in methods]
    for run in runs:
        assert [h["step"] for h in run.history] == [10, 20]
        assert run.history[-1]["perplexity"]["3"] < run.history[0]["perplexity"]["3"]
    content = json.loads((out / "looped_lm_abc.json").read_text(), parse_constant=pytest.fail)
    assert content["runs"][0]["history"] == runs[0].history
    assert content["costs"].keys() == set(methods)
    assert str(tmp_path) not in (out / "looped_lm_abc.json").read_text()
    with (out / "looped_lm_abc.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"]) for row in rows] == [(r.method, str(r.seed)) for r in runs]
    last = runs[-1].history[-1]
    for loops in ("1", "3", "6"):
        expected = pytest.approx(last["perplexity"][loops], rel=1e-3)
        assert float(rows[-1][f"perplexity at {loops}"]) == expected
    assert len({row["MiB"] for row in rows if row["method"] == methods[0]}) == 1
    assert float(rows[-1]["ms/step"]) > 0
    assert (out / "looped_lm_abc.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    both = [run.history[-1]["perplexity"]["3"] for run in runs if run.method == methods[0]]
    assert f"{sum(both) / 2:.2f} ± {abs(both[0] - both[1]) / 2:.2f}" in printed
    cells = dict(zip(methods, printed.splitlines()[-3:], strict=True))[methods[0]].split()
    assert cells[-3] == "1.00"  # the time of a step, over its own
    model = AutoModelForCausalLM.from_pretrained(out / "ift_uniform_1_5" / "seed_1")
    assert str(model.equilibrium.steps) == "uniform(1, 5)"


def test_perplexity_and_residual(example, argv):
    args = example.of_seed(example.parse(argv), 0)
    model = example.make_model("tbptt@3", args, 7)
    data = torch.randint(7, (48,))
    found = example.evaluate(model, data, args)
    assert model.training
    sequences = data.view(4, 12)
    with torch.no_grad():
        for loops in (1, 3, 6):
            expected = math.exp(by_hand(model, sequences, loops, loops).item())
            assert found["perplexity"][str(loops)] == pytest.approx(expected, rel=1e-4)
        func, h = model.recurrence(sequences)
        for _ in range(3):
            h = func(h)
        image = func(h)
    change = [((image[i] - h[i]).norm() / image[i].norm()).item() for i in range(4)]
    assert found["residual"] == pytest.approx(sum(change) / 4, rel=1e-4)
    one, state = model.recurrence(sequences[:1])[0], h[:1]
    jacobian = torch.autograd.functional.jacobian(one, state).reshape(192, 192)
    radius = torch.linalg.eigvals(jacobian.double()).abs().max().item()
    alone = example.evaluate(model, data[:12], args)
    assert alone["spectral_radius"] == pytest.approx(radius, rel=0.05)


@pytest.mark.filterwarnings("ignore:h is no equilibrium")  # after so few evaluations
def test_a_killed_run_resumes_with_the_same_losses_and_draws(example, argv, monkeypatch):
    methods = ["--methods", "tbptt(k='uniform(1, 3)')@poisson(3)", "ift(warm_start=True)"]
    original, drawn = example.train_step, []

    def noting(model, optimizer, ids, step, args):
        output = original(model, optimizer, ids, step, args)
        drawn.append((step, int(model.equilibrium.last.nfe)))
        return output

    def killed(model, optimizer, ids, step, args):
        if len(drawn) == 13:  # in the second method
            raise KeyboardInterrupt
        return noting(model, optimizer, ids, step, args)

    monkeypatch.setattr(example, "step_costs", lambda *args: {})
    monkeypatch.setattr(example, "train_step", noting)
    whole = example.main([*argv, "--name", "whole", "--out", str(argv[-1]) + "_whole", *methods])
    undisturbed, drawn[:] = list(drawn), []
    assert len({nfe for _, nfe in undisturbed[:8]}) > 1
    monkeypatch.setattr(example, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        example.main([*argv, *methods])
    monkeypatch.setattr(example, "train_step", noting)
    resumed = example.main([*argv, *methods, "--resume"])
    assert [step for step, _ in drawn] == [*range(8), *range(5), *range(4, 8)]
    assert drawn[:8] + drawn[8:12] + drawn[13:] == undisturbed
    assert [run.history for run in resumed] == [run.history for run in whole]


@pytest.mark.filterwarnings("ignore:h is no equilibrium")  # after so few evaluations
def test_reports_leave_the_training_as_it_is(example, argv, monkeypatch):
    monkeypatch.setattr(example, "step_costs", lambda *args: {})
    methods = [
        "tbptt(k='uniform(1, 3)')@poisson(3)",
        "ramp('upg', {'k': (1, 3)}, until=0.5)",
        "ift",
    ]
    argv = [*argv, "--steps", "20", "--methods", *methods]
    plain, watched = example.main(argv), example.main([*argv, "--report"])
    resumed = example.main([*argv, "--resume"])  # reports or not, it is the same training
    assert [run.history for run in resumed] == [run.history for run in watched]
    for one, other in zip(plain, watched, strict=True):
        reports = [row for row in other.history if "report_rho" in row]
        assert [row["step"] for row in reports] == [0, 2, 20]
        for row in reports:
            assert -1 <= row["cosine"] <= 1 + 1e-6
            assert row["cosine"] == pytest.approx(1, abs=1e-3) or other.method != "ift"
        assert reports[-1]["perplexity"] == one.history[-1]["perplexity"]
        assert [row for row in one.history if "perplexity" in row] == [
            {key: value for key, value in row.items() if key in one.history[0]}
            for row in other.history
            if "perplexity" in row
        ]


def test_costs(example, argv):
    """Of the same steps for all; what holds more graphs takes more memory."""
    args = example.of_seed(example.parse(argv), 0)
    models = {}
    for method in ("tbptt(k=1)@6", "tbptt('all')@6"):
        model = example.make_model(method, args, 7).train()
        models[method] = model, example.make_optimizer(model, args)
    taken = []
    for model, _ in models.values():
        model.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    one, all_six = example.step_costs(models, torch.randint(7, (60,)), args).values()
    assert len(taken) == 8  # two models, two points, a round and once more for its memory
    assert torch.equal(taken[0], taken[1])
    assert not torch.equal(taken[0], taken[4])
    assert all_six["bytes"] > 1.5 * one["bytes"] > 0
    assert one["seconds"] > 0


def test_other_settings_cannot_be_resumed(example, argv):
    example.main([*argv, "--methods", "jfb", "--steps", "1"])
    with pytest.raises(SystemExit, match=r"cannot be resumed: lr was 0\.006; drop --resume"):
        example.main([*argv, "--methods", "jfb", "--steps", "1", "--resume", "--lr", "1"])


def test_a_run_that_fails_does_not_stop_the_others(example, argv, tmp_path, monkeypatch, capsys):
    original = example.train_step

    def fails(model, optimizer, ids, step, args):
        if model.config.grad == "npg" and step == 3:
            with torch.no_grad():
                model.adapter.weight.fill_(float("inf"))
        return original(model, optimizer, ids, step, args)

    monkeypatch.setattr(example, "train_step", fails)
    failed, fine = example.main([*argv, "--methods", "npg", "upg"])
    assert "NaN or Inf" in failed.error
    assert failed.steps == 3
    assert fine.error is None
    with (tmp_path / "out" / "looped_lm_abc.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["steps"].startswith("3: ValueError")
    assert rows[1]["steps"] == "8"
    assert "0; seed 0, step 3: ValueError" in capsys.readouterr().out


def test_a_loop_that_overflows_later_is_shown_as_such(example, argv):
    """A model may be good at the loops of training, and no number at more."""
    args = example.of_seed(example.parse(argv), 0)
    model = example.make_model("tbptt@1", args, 7)
    with torch.no_grad():
        model.adapter.weight[:, :16] = 1e20 * torch.eye(16)  # h = 0 at the first evaluation
    found = example.evaluate(model, torch.randint(7, (48,)), args)
    assert math.isfinite(found["perplexity"]["1"])
    assert found["perplexity"]["6"] == math.inf
    run = example.Run("tbptt@1", 0, 8, [{"step": 8, "train_loss": 1.0, **found}])
    (row,) = example.table([run], {}, args)[1]
    assert row[3] == ">1000"
    assert row[1] == f"{found['perplexity']['1']:.2f}"  # one seed has no deviation
    assert example.plot([run], args).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--methods", "nope"], "unknown strategy 'nope'"),
        (["--methods", "upg@poison(8)"], "steps='poison(8)'; expected a whole number"),
        (["--methods", "upg@0"], "steps=0; expected a whole number of at least 1"),
        (["--loops", "many"], "steps='many'; expected a whole number of at least 1"),
        (["--heads", "3"], "expected a multiple of twice the heads"),
        (["--test-loops", "0", "4"], "above 0"),
        (["--layers", "1", "0", "1"], "above 0"),
    ],
)
def test_bad_arguments(example, argv, extra, message, capsys):
    with pytest.raises(SystemExit):
        example.main([*argv, *extra])
    assert message in capsys.readouterr().err


def test_a_text_that_is_too_short(example, argv, text):
    text.write_text("short", encoding="utf-8")
    with pytest.raises(SystemExit, match="the text has 5 characters; expected at least 130"):
        example.main(argv)


@pytest.mark.filterwarnings("ignore:h is no equilibrium")  # after so few evaluations
def test_reports_of_a_short_text_and_of_a_run_that_fails(example, argv, text, tmp_path, capsys):
    text.write_text("the cat sat. " * 40, encoding="utf-8")  # four sequences to validate with
    argv = [*argv, "--report", "--steps", "2", "--methods", "tbptt(k=2)"]
    (fine,) = example.main(argv)
    assert [row["step"] for row in fine.history if "report_rho" in row] == [0, 1, 2]
    (failed,) = example.main([*argv, "--lr", "1e30", "--steps", "8"])
    assert failed.error is not None
    assert "perplexity" not in failed.history[-1]  # the report of the start is all there is
    assert "0; seed 0, step 1" in capsys.readouterr().out
