from __future__ import annotations

import csv
import sys

import pytest
import torch

pytest.importorskip("torch_geometric")

from conftest import load_example


@pytest.fixture(scope="module")
def example():
    yield load_example("train_ignn")
    del sys.modules["train_ignn"]


def test_chains(example):
    data = example.chains(12, seed=3)
    assert (data.num_nodes, data.num_edges, data.num_features) == (480, 40 * 11, 100)
    source, target = data.edge_index
    assert torch.equal(target, source + 1)
    assert not ((target % 12) == 0).any()  # directed, and no edge from chain to chain
    first = torch.arange(0, 480, 12)
    assert torch.equal(data.x.sum(1).nonzero().flatten(), first)
    assert torch.equal(data.x[first].argmax(1), data.y[first])
    assert torch.equal(data.y.view(40, 12), data.y[first, None].expand(40, 12))
    masks = torch.stack([data.train_mask, data.val_mask, data.test_mask])
    assert masks.sum(1).tolist() == [20, 100, 200]
    assert masks.sum(0).max() == 1
    assert torch.equal(data.train_mask, example.chains(12, seed=3).train_mask)
    assert not torch.equal(data.train_mask, example.chains(12, seed=4).train_mask)


def test_long_chains_are_learned_where_three_hops_are_not_enough(example, tmp_path):
    settings = ["--lengths", "10", "20", "--seeds", "0", "--epochs", "200", "--out", str(tmp_path)]
    runs = example.main([*settings, "--grad", "ift", "upg"])
    found = {(run.part["length"], run.method): run.accuracy for run in runs}
    for length in (10, 20):
        assert found[length, "ift"] == 1
        assert found[length, "upg"] == 1
        # Four of a chain's nodes see its first node; the others are guessed.
        assert found[length, example.GCN] < 0.5 + 0.5 * 4 / length + 0.1
    with (tmp_path / "ignn_chains.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == [example.GCN, "ift", "upg"] * 2
    assert (tmp_path / "ignn_chains.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "ignn_chains.csv",
        "ignn_chains.png",
    ]


def test_a_method_that_learned_nothing_is_not_tried_on_longer_chains(
    example, tmp_path, monkeypatch
):
    def fake(model, data, task, on_epoch):
        length = data.num_nodes // 40
        knows = {"IGNN": 0.5 + 0.5 * (length < 30), "GCN": 0.5}
        return example.Run("", "", {}, knows[type(model).__name__], 0.0, 1, 0.0)

    monkeypatch.setattr(example, "train_nodes", fake)
    settings = ["--lengths", "40", "10", "30", "--seeds", "0", "1", "--out", str(tmp_path)]
    runs = example.main([*settings, "--grad", "upg"])
    lengths = {
        method: [run.part["length"] for run in runs if run.method == method]
        for method in ("upg", example.GCN)
    }
    assert lengths == {"upg": [10, 10, 30, 30], example.GCN: [10, 10, 30, 30, 40, 40]}


def test_cora(example, tmp_path, monkeypatch):
    data = example.chains(10, seed=0)
    monkeypatch.setattr(example, "load", lambda name, root: data)
    settings = ["--data", "Cora", "--epochs", "20", "--seeds", "0", "1", "--out", str(tmp_path)]
    runs = example.main([*settings, "--grad", "ift"])
    assert [run.part for run in runs] == [{"seed": 0}, {"seed": 1}]


def test_damping_is_an_option(example):
    args, task = example.parse(["--lam", "0.6", "--kappa", "0.95", "--f-tol", "1e-9"])
    assert (task.lam, task.kappa, task.f_tol) == (0.6, 0.95, 1e-9)
    model = example.make_model(3, 2, "npg(k=7)", task)
    assert repr(model.convs[0].equilibrium.grad) == "npg(k=7, lam=0.6)"
    model = example.make_model(3, 2, "npg(lam=0.9)", task)
    assert repr(model.convs[0].equilibrium.grad) == "npg(k=5, lam=0.9)"
    assert args.grad == ["ift", "upg", "npg"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--grad", "nope"], "unknown strategy 'nope'"),
        (["--kappa", "1"], "kappa=1.0; expected a number above 0 and below 1"),
        (["--lam", "2"], "lam=2.0"),
        (["--lengths", "4"], "--lengths 4: expected 8 or more"),
    ],
)
def test_bad_arguments(example, argv, message, capsys):
    with pytest.raises(SystemExit):
        example.main(argv)
    assert message in capsys.readouterr().err


def test_data_needs_a_folder(example):
    with pytest.raises(SystemExit, match="--data Cora needs --root DIR"):
        example.main(["--data", "Cora"])
