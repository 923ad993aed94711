"""`tune`: what `auto` would choose, over several batches and without a trace."""

from __future__ import annotations

import json
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import deq_phantom_plugin as dpp
from deq_phantom_plugin.cli import main


class Net(nn.Module):
    """An equilibrium between two layers, with batch statistics before it."""

    def __init__(self, grad="upg", norm=0.8, **options):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.inject = nn.BatchNorm1d(4), nn.Linear(4, 12)
        self.inner, self.out = nn.Linear(12, 12), nn.Linear(12, 3)
        nn.init.orthogonal_(self.inner.weight, norm)
        options = {"tol": 1e-5, "max_iter": 200, "batch_dim": 0, **options}
        self.equilibrium = dpp.Equilibrium("fixed_point", grad, **options)

    def forward(self, x):
        u = self.inject(self.norm(x))
        return self.out(
            self.equilibrium(lambda h: torch.tanh(self.inner(h) + u), torch.zeros_like(u))
        )


def batches(count=3, rows=8):
    torch.manual_seed(1)
    return [(torch.randn(rows, 4), torch.randint(0, 3, (rows,))) for _ in range(count)]


def test_of_one_batch_it_is_what_auto_chooses_there():
    """Of the same v: the value that `upg` gives is almost that of the step that measures."""
    model, (batch,) = Net(), batches(1)
    report = dpp.tune(model, [batch], F.cross_entropy)
    trained = Net("auto")
    dpp.set_step(trained, 0)
    F.cross_entropy(trained(batch[0]), batch[1]).backward()
    (record,) = dpp.report_choice(trained)
    (found,) = report.equilibria
    assert report.spec == found.spec == record.spec
    assert report.specs == {"equilibrium": record.spec}
    assert found.cosine == pytest.approx(record.cosine, abs=1e-3)
    assert found.cost == record.cost
    assert found.samples == 8


class Two(nn.Module):
    """Our equilibrium, and TorchDEQ's with two states in training."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 4)
        self.first = dpp.Equilibrium(tol=1e-6, max_iter=100)
        options = {"f_max_iter": 40, "f_tol": 1e-7, "n_states": 2, "grad": "ift"}
        self.rest = nn.ModuleList([pytest.importorskip("torchdeq").get_deq(**options)])

    def forward(self, x):
        h = self.first(lambda h: torch.tanh(0.2 * self.inner(h) + x), torch.zeros_like(x))
        states, _ = self.rest[0](lambda g: torch.tanh(0.8 * self.inner(g) + h), torch.zeros_like(h))
        return sum(states)


def test_names_are_those_of_modules_as_what_auto_chose_has_them():
    dpp.enable("torchdeq")
    model, x = Two(), torch.randn(5, 4)
    found = dpp.tune(model, [x], lambda h: h.square().mean())
    assert set(found.specs) == {"first", "rest.0"}
    for name, spec in found.specs.items():
        assert dpp.set_grad(model.get_submodule(name), spec) == 1
    dpp.set_grad(model, "auto")
    dpp.set_step(model, 0)
    model(x).square().mean().backward()
    names = [record.equilibrium for record in dpp.report_choice(model)]
    assert names == ["first", "rest.0[0]", "rest.0[1]"]


def test_of_several_batches_the_cosine_is_their_mean_weighted_by_samples():
    sizes, data = (8, 4), []
    for rows in sizes:
        data += batches(1, rows)
    spec = dpp.tune(Net(), data, F.cross_entropy).spec

    def cosine_of(part):
        (found,) = dpp.tune(Net(), part, F.cross_entropy).equilibria
        return next(c.cosine for c in found.candidates if c.spec == spec)

    want = sum(n * cosine_of([batch]) for n, batch in zip(sizes, data, strict=True)) / sum(sizes)
    assert cosine_of(data) == pytest.approx(want, abs=1e-6)


def test_what_may_not_be_taken_is_not_shown():
    """Undamped steps lead away from an eigenvalue of -1.4, whatever their cosine is."""
    model = Net()
    with torch.no_grad():
        model.inner.weight.copy_(-1.4 * torch.eye(12))
    model.equilibrium = dpp.Equilibrium("anderson", "upg", tol=1e-5, max_iter=200, batch_dim=0)
    (found,) = dpp.tune(model, batches(), F.cross_entropy).equilibria
    shown = [candidate.spec for candidate in found.candidates]
    assert found.spec in shown
    assert "npg(k=3, lam=0.6)" in shown
    assert not any(re.fullmatch(r"[nu]pg\(k=([2-9]|..), lam=(1.0|0.9)\)", spec) for spec in shown)


def test_it_leaves_no_trace():
    model = Net("auto").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = torch.get_rng_state()
    data = batches()
    torch.set_rng_state(drawn)
    dpp.tune(model, data, F.cross_entropy)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not model.training
    assert not dpp.report_choice(model)
    assert all(p.grad is None for p in model.parameters())
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_wishes_and_methods():
    data = batches(2)
    loose, strict = (dpp.tune(Net(), data, F.cross_entropy, cosine=c) for c in (0.9, 0.999))
    assert loose.equilibria[0].cost < strict.equilibria[0].cost
    least = dpp.tune(Net(), data, F.cross_entropy, budget=1)
    assert least.spec == "jfb"
    own = dpp.tune(Net(), data, F.cross_entropy, methods=["jfb", "npg(k=9)"], cosine=0.99)
    assert own.spec in ("jfb()", "npg(k=9, lam=0.5)")
    assert {c.spec for c in own.equilibria[0].candidates} == {"jfb()", "npg(k=9, lam=0.5)"}


def test_a_solve_that_stopped_early_is_said():
    report = dpp.tune(Net(max_iter=2, tol=1e-3), batches(), F.cross_entropy)
    assert report.spec.startswith("upg(k=5")
    assert report.equilibria[0].why.startswith("not at its equilibrium")
    assert report.equilibria[0].cosine is None
    assert "not at its equilibrium" in str(report)


def test_a_loss_of_the_output_alone():
    inputs = [x for x, _ in batches()]
    report = dpp.tune(Net(), inputs, lambda out: out.square().mean())
    assert report.batches == 3


def test_several_equilibria_and_the_dearest_for_the_whole():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.easy, self.hard = Net(norm=0.2), Net(norm=0.95)

        def forward(self, x):
            return self.easy(x) + self.hard(x)

    report = dpp.tune(Two(), batches(), F.cross_entropy)
    assert list(report.specs) == ["easy.equilibrium", "hard.equilibrium"]
    costs = [found.cost for found in report.equilibria]
    assert costs[0] < costs[1]
    assert report.spec == report.specs["hard.equilibrium"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((Net(), [], F.cross_entropy), "batches is empty"),
        ((Net(), torch.zeros(2, 4), F.cross_entropy), "batches is a Tensor"),
        ((Net(), [torch.zeros(2, 4)], F.cross_entropy), "expected a pair"),
        ((nn.Linear(2, 2), [torch.zeros(2, 2)], torch.sum), "no equilibrium"),
        ((Net(), [torch.zeros(2, 9)], lambda out: out.sum()), "refused its inputs"),
        ((Net(), [torch.randn(4, 4)], lambda out: out.sum() / 0), "NaN or infinite"),
        ((Net(), [torch.randn(4, 4)], lambda out: 0 * out.sum()), "dL/dh is zero in every sample"),
    ],
)
def test_what_is_wrong_is_said(arguments, words):
    with pytest.raises(ValueError, match=words):
        dpp.tune(*arguments)


def test_the_table_has_what_nothing_beats_and_marks_the_choice():
    report = dpp.tune(Net(), batches(), F.cross_entropy)
    lines = str(report).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("strategy"))
    rows = [line.split("  ") for line in lines[start + 2 : lines.index("", start)]]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    costs = [float(row[2]) for row in cells]
    cosines = [float(row[1]) for row in cells]
    assert costs == sorted(costs)
    assert cosines == sorted(cosines)
    assert [row[0] for row in cells if row[0].endswith(" *")] == [f"{report.spec} *"]
    assert lines[-1] == f'grad="{report.spec}"'


SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
from test_tune import Net, batches
import torch.nn.functional as F

def build():
    return Net(), batches(), F.cross_entropy

def wrong():
    return Net(), batches()
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SCRIPT.format(folder=str(__import__("pathlib").Path(__file__).parent)))
    return path


def test_the_command(script, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    assert main(["tune", f"{script}:build", "--cosine", "0.9", "--out", str(out)]) == 0
    spec = re.search(r'^grad="(.+)"$', capsys.readouterr().out, re.M)[1]
    numbers = json.loads((out / "tune.json").read_text())
    assert numbers["equilibria"][0]["spec"] == spec
    page = (out / "tune.html").read_text()
    assert spec in page
    assert "data:image/svg+xml" in page


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--cosine", "2"], "cosine=2.0; expected a number in"),
        (["--methods", "nothing"], "unknown strategy 'nothing'"),
        (["--methods", "bptt"], "owns its solve"),
    ],
)
def test_bad_input_on_the_command_line(script, options, words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["tune", f"{script}:build", *options])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_a_function_that_returns_something_else(script, capsys):
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit):
        main(["tune", f"{script}:wrong"])
    assert "expected (model, batches, loss)" in capsys.readouterr().err
