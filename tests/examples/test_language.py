"""examples/language.py: what the examples of language models share."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys

import pytest
import torch

from conftest import ROOT

ARGS = argparse.Namespace(seed=0, length=12, batch=4, steps=100, lr=1.0)


@pytest.fixture(scope="module")
def language():
    sys.path.insert(0, str(ROOT / "examples"))
    yield importlib.import_module("language")
    sys.path.remove(str(ROOT / "examples"))


def test_default_text_ships_with_python(language):
    text = language.load_text(None)
    assert len(text) > 100_000
    assert "lambda" in text
    ids, characters = language.encode(text)
    assert "".join(characters[i] for i in ids[:50].tolist()) == text[:50]


def test_batches_depend_on_the_step_alone(language):
    data = torch.arange(500)
    first = language.batch_at(data, 3, ARGS)
    assert torch.equal(first, language.batch_at(data, 3, ARGS))
    assert not torch.equal(first, language.batch_at(data, 4, ARGS))
    assert first.shape == (4, 12)
    assert torch.equal(first - first[:, :1], torch.arange(12).expand(4, 12))


def test_learning_rate(language):
    rates = [language.learning_rate(step, ARGS) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == 1
    assert rates == sorted(rates[:5]) + sorted(rates[5:], reverse=True)
    assert 0 < rates[-1] < 0.01


def test_split(language, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcde" * 30, encoding="utf-8")
    training, validation, characters = language.split(path, 12)
    assert characters == list("abcde")
    assert torch.equal(torch.cat([training, validation]), torch.arange(5).repeat(30))
    assert len(training) == 135
    with pytest.raises(SystemExit, match="has 150 characters; expected at least 160"):
        language.split(path, 15)


def test_files(language):
    found = language.finite({"good": [1.5], "bad": [math.nan, math.inf]})
    assert json.loads(json.dumps(found, allow_nan=False)) == {"good": [1.5], "bad": [None, None]}
    assert language.slug("upg(k=5, lam=0.8)@poisson(8)") == "upg_k=5_lam=0.8_poisson_8"
    assert language.as_csv([["a", "b, c"], [1, 2]]) == b'a,"b, c"\n1,2\n'
