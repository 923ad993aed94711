"""`deq-phantom doctor`: extras, PyTorch's build, and what an issue on a wrong gradient needs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

import deq_phantom_plugin as dpp
from conftest import ROOT
from deq_phantom_plugin._plumbing import extras
from deq_phantom_plugin.cli import main
from deq_phantom_plugin.diagnostics.self_check import self_check
from deq_phantom_plugin.patching import doctor


def shown(capsys, *arguments):
    assert main(["doctor", *arguments]) == 0
    return capsys.readouterr().out


def named_in_pyproject():
    """The extras, read without a parser of TOML, which Python 3.10 lacks."""
    text = (ROOT / "pyproject.toml").read_text()
    section = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    return re.findall(r"^([\w-]+) = \[", section, re.M)


def test_it_knows_every_extra(capsys):
    out = shown(capsys)
    assert len(named_in_pyproject()) > 10
    for extra in named_in_pyproject():
        assert re.search(rf"^  {extra} +(complete|lacks )", out, re.M), extra


def test_an_extra_that_is_new_is_read_from_the_metadata(capsys, monkeypatch):
    lines = [
        "torch>=2.6",
        'no-such-trainer>=2; extra == "flash"',
        'pytest>=8 ; python_version >= "3.8" and extra == "both"',
        "deq-phantom-plugin[flash]; extra == 'both'",
    ]
    monkeypatch.setattr(extras, "requires", lambda name: lines)
    assert extras.extras() == {
        "flash": ["no-such-trainer"],
        "both": ["no-such-trainer", "pytest"],
    }
    out = shown(capsys)
    assert "no-such-trainer   missing" in out
    assert "  flash           lacks no-such-trainer" in out
    assert 'missing: no-such-trainer: pip install "deq-phantom-plugin[flash]"' in out


def test_nobody_misses_what_developers_need(capsys, monkeypatch):
    monkeypatch.setattr(extras, "requires", lambda name: ['no-such-tool; extra == "docs"'])
    out = shown(capsys)
    assert "  docs            lacks no-such-tool" in out
    assert "missing" not in out


@pytest.mark.parametrize(
    ("versions", "devices", "said"),
    [
        ({}, 0, "CPU build"),
        ({"cuda": "13.0"}, 0, "CUDA 13.0 build, but it sees no GPU"),
        ({"cuda": "13.0"}, 2, "CUDA 13.0 build, card 0, card 1"),
        ({"hip": "7.1"}, 1, "ROCm 7.1 build, card 0"),
    ],
)
def test_it_says_what_pytorch_was_built_for(monkeypatch, capsys, versions, devices, said):
    for kind in ("cuda", "hip", "xpu"):
        monkeypatch.setattr(torch.version, kind, versions.get(kind), raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"card {i}")
    assert doctor._build() == said


def test_known_gradients_are_right_here():
    checks = self_check()
    assert {check.strategy.partition("(")[0] for check in checks} >= {"ift", "npg", "upg", "bptt"}
    assert all(check.right for check in checks), "\n".join(map(str, checks))


def test_a_wrong_gradient_is_seen(monkeypatch):
    monkeypatch.setattr(dpp.IFT, "attach", lambda self, func, h, context: func(h))

    def fails(self, func, h, context):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(dpp.Exact, "attach", fails)
    found = {check.strategy.partition("(")[0]: str(check) for check in self_check()}
    assert re.search(r"WRONG, relative error \d", found["ift"])
    assert "WRONG, RuntimeError: no kernel image" in found["exact"]
    assert "right, relative error" in found["npg"]


def test_the_report_for_an_issue(monkeypatch, capsys):
    home = Path(sys.executable).parents[1]
    monkeypatch.setattr(Path, "home", lambda: home)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = shown(capsys, "--report")
    assert f"torch             {torch.__version__}" in out
    assert "OMP_NUM_THREADS=1" in out
    assert f"{torch.get_num_threads()} threads" in out
    assert re.search(r"^  exact +cpu +right, relative error ", out, re.M)
    assert str(home) not in out
    assert "~" in out
