from __future__ import annotations

import csv
import importlib
import json
import math
import sys

import pytest
import torch

from conftest import ROOT

pytest.importorskip("torchdeq")
pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(ROOT / "examples"))
    yield importlib.import_module("train_lm")
    sys.path.remove(str(ROOT / "examples"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "abc.txt"
    path.write_text("the cat sat on the mat. " * 60, encoding="utf-8")
    return path


@pytest.fixture
def argv(text, tmp_path):
    sizes = ["--hidden", "16", "--heads", "2", "--length", "12", "--batch", "4"]
    steps = ["--steps", "8", "--eval-every", "2", "--eval-sequences", "4", "--dropout", "0.1"]
    return ["--text", str(text), *sizes, *steps, "--out", str(tmp_path / "out")]


def numbers(run):
    """What a run measured, without times."""
    return [(h["step"], h["loss"], h["spectral_radius"], h.get("train_loss")) for h in run.history]


def test_results(example, argv, tmp_path, capsys):
    methods = ["--methods", "upg", "npg(k=3)+jr=0.1"]
    runs = example.main([*argv, *methods, "--steps", "40", "--eval-every", "20", "--lr", "1e-2"])
    out = tmp_path / "out"
    assert [run.method for run in runs] == ["upg", "npg(k=3)+jr=0.1"]
    for run in runs:
        assert [h["step"] for h in run.history] == [0, 20, 40]
        assert run.history[-1]["perplexity"] < 0.8 * run.history[0]["perplexity"]
        last = run.history[-1]
        assert last["perplexity"] == pytest.approx(math.exp(last["loss"]))
        assert len(run.seconds) == run.steps == 40
    content = json.loads((out / "lm_abc.json").read_text(), parse_constant=pytest.fail)
    assert content["runs"][0]["history"] == runs[0].history
    assert str(tmp_path) not in (out / "lm_abc.json").read_text()
    with (out / "lm_abc.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["upg", "npg(k=3)+jr=0.1"]
    assert float(rows[1]["perplexity"]) == pytest.approx(last["perplexity"], abs=1e-3)
    assert (out / "lm_abc.png").read_bytes().startswith(b"\x89PNG")
    assert "npg(k=3)+jr=0.1" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(out / "npg_k=3_+jr=0.1")
    assert model.config.grad == "npg(k=3)"
    assert model.config.jac_reg_weight == 0.1


def test_perplexity_is_that_of_the_whole_validation_text(example, argv):
    args = example.parse(argv)
    model = example.make_model("jfb", args, 7)
    data = torch.randint(7, (48,))
    found = example.evaluate(model, data, args)
    model.eval()
    total = 0.0
    with torch.no_grad():
        for i in range(4):
            ids = data[None, 12 * i : 12 * i + 12]
            logits = model(ids).logits[0, :-1].double()
            total += torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()
    assert found["perplexity"] == pytest.approx(math.exp(total / 4), rel=1e-3)
    radius = model.spectral_radius(data.view(4, 12), tol=1e-3, max_iter=500)
    assert found["spectral_radius"] == pytest.approx(radius.mean().item(), rel=0.1)


def test_a_killed_run_resumes_with_the_same_losses(example, argv, tmp_path, monkeypatch):
    argv = [*argv, "--methods", "upg+jr", "npg"]
    whole = example.main([*argv[:-3], "--out", str(tmp_path / "whole"), *argv[-3:]])
    original, taken = example.train_step, []

    def killed(model, optimizer, ids, step, args):
        taken.append(step)
        if len(taken) == 14:  # in the second method
            raise KeyboardInterrupt
        return original(model, optimizer, ids, step, args)

    monkeypatch.setattr(example, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        example.main(argv)
    resumed = example.main([*argv, "--resume"])
    assert taken == [*range(8), *range(6), *range(4, 8)]
    assert [numbers(run) for run in resumed] == [numbers(run) for run in whole]


def test_other_settings_cannot_be_resumed(example, argv):
    example.main([*argv, "--methods", "jfb"])
    with pytest.raises(SystemExit, match=r"cannot be resumed: lr was 0\.002; drop --resume"):
        example.main([*argv, "--methods", "jfb", "--resume", "--lr", "1"])


def test_a_run_that_fails_does_not_stop_the_others(example, argv, tmp_path, monkeypatch, capsys):
    original = example.train_step

    def fails(model, optimizer, ids, step, args):
        if model.config.grad == "npg" and step == 3:
            with torch.no_grad():
                model.model.block.up.weight.fill_(float("inf"))
        return original(model, optimizer, ids, step, args)

    monkeypatch.setattr(example, "train_step", fails)
    failed, fine = example.main([*argv, "--methods", "npg", "upg"])
    assert "NaN or Inf" in failed.error
    assert failed.steps == 3
    assert fine.error is None
    assert fine.steps == 8
    with (tmp_path / "out" / "lm_abc.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["steps"].startswith("3: ValueError")
    assert rows[1]["steps"] == "8"
    assert "NaN or Inf" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_is_an_error(example, argv):
    args = example.parse(argv)
    model = example.make_model("jfb", args, 7)
    optimizer = torch.optim.AdamW(model.parameters())
    before = model.model.block.up.weight.clone()
    with torch.no_grad():
        model.lm_head.weight[0] = float("inf")
    with pytest.raises((FloatingPointError, ValueError)):
        example.train_step(model, optimizer, torch.randint(1, 7, (2, 6)), 0, args)
    assert torch.equal(model.model.block.up.weight, before)


def test_a_prompt_is_continued(example, argv, capfd):
    example.main([*argv, "--methods", "jfb", "--prompt", "the cat"])
    assert "--- jfb\nthe cat" in capfd.readouterr().out.replace("\r", "\n")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--methods", "nope"], "unknown strategy 'nope'"),
        (["--methods", "upg+jr=x"], "expected +jr, or +jr=WEIGHT such as +jr=0.1"),
        (["--heads", "3"], "expected a multiple of twice the heads"),
        (["--f-solver", "newton"], "f_solver='newton'"),
        (["--steps", "0"], "above 0"),
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
