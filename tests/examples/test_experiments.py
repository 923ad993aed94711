"""examples/experiments: settings, data, resuming, and the smoke size of every script."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import deq_phantom_plugin as dpp
from conftest import ROOT

pytest.importorskip("yaml")
pytest.importorskip("tensorboard")
pytest.importorskip("torchdeq")
pytest.importorskip("transformers")
pytest.importorskip("torch_geometric")
pytest.importorskip("tiny_recursive_model")

FOLDER = ROOT / "examples" / "experiments"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _on_path():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


@pytest.fixture
def harness():
    def load(name):
        return importlib.import_module(f"harness.{name}")

    return load


def experiment(name):
    return importlib.import_module(name).EXPERIMENT


@pytest.mark.parametrize("watched", [False, True])
def test_a_log_has_no_progress_bar(harness, capsys, monkeypatch, watched):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: watched, raising=False)
    with harness("command")._bar("run", types.SimpleNamespace(total=3, steps=1)) as bar:
        bar.update()
    assert (capsys.readouterr().err != "") is watched


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("size", ["smoke", "cpu", "paper"])
def test_every_file_can_be_read_and_names_strategies(name, size, harness):
    plan = harness("plan").load_plan(FOLDER / f"{name}.yaml", size, experiment(name).settings)
    assert plan.runs
    assert plan.repeats
    for settings in plan.runs.values():
        if isinstance(settings.grad, str):
            dpp.get_strategy(settings.grad)


@dataclasses.dataclass(frozen=True)
class Settings:
    lr: float
    steps: int
    grad: str | int
    sizes: tuple[int, ...] = ()
    on: bool = False


TEXT = """
repeats: {paper: [0, 1], smoke: [0]}
select: {smoke: [b]}
paper: {lr: 1, steps: 9, grad: ift, sizes: [1, 2]}
smoke: {steps: 2}
runs:
  a: {}
  b: {grad: 5, steps: 4, smoke: {steps: 3}}
"""


def test_runs_change_sizes_and_sizes_change_the_paper(tmp_path, harness):
    path = tmp_path / "x.yaml"
    path.write_text(TEXT)
    load = harness("plan").load_plan
    paper = load(path, "paper", Settings)
    assert list(paper.runs) == ["a", "b"]
    assert paper.repeats == (0, 1)
    assert paper.runs["a"] == Settings(1.0, 9, "ift", (1, 2))
    assert paper.runs["b"] == Settings(1.0, 4, 5, (1, 2))
    assert isinstance(paper.runs["a"].lr, float)
    path.write_text(TEXT.replace("lr: 1", "lr: 1e-3"))  # a string, says YAML
    assert load(path, "paper", Settings).runs["a"].lr == 0.001
    path.write_text(TEXT)
    smoke = load(path, "smoke", Settings)
    assert list(smoke.runs) == ["b"]
    assert smoke.runs["b"].steps == 3
    changed = load(path, "smoke", Settings, {"steps": 7}, runs=["a"], repeats=[5])
    assert changed.runs == {"a": Settings(1.0, 7, "ift", (1, 2))}
    assert changed.repeats == (5,)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps: 9", "step: 9", "x.yaml: paper: unknown 'step' (did you mean 'steps'?)"),
        ("steps: 9", "steps: many", "x.yaml: paper: steps='many'; expected int"),
        ("steps: 9", "steps: true", "x.yaml: paper: steps=True; expected int"),
        ("steps: 9,", "", "x.yaml: a: no steps"),
        ("grad: 5", "grad: 0.5", "x.yaml: runs: b: grad=0.5; expected str or int"),
        ("select: {smoke: [b]}", "select: {smoke: [c]}", "unknown 'c'"),
        ("smoke: {steps: 2}", "smok: {}", "unknown 'smok' (did you mean 'smoke'?)"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, harness, old, new, message):
    path = tmp_path / "x.yaml"
    path.write_text(TEXT.replace(old, new, 1))
    with pytest.raises(ValueError, match=re.escape(message)):
        for size in ("smoke", "paper"):
            harness("plan").load_plan(path, size, Settings)


@given(
    st.dictionaries(
        st.from_regex(r"[a-z_]{1,8}", fullmatch=True),
        st.one_of(
            st.integers(), st.booleans(), st.from_regex(r"x[a-z(){}:=, ]{0,12}\)", fullmatch=True)
        ),
        min_size=1,
        max_size=1,
    )
)
def test_changes_on_the_command_line_are_yaml(change):
    plan = importlib.import_module("harness.plan")
    ((key, value),) = change.items()
    assert plan.parse_change(f"{key}={json.dumps(value)}") == (key, value)


def test_changes_without_a_value_are_refused(harness):
    with pytest.raises(ValueError, match="expected KEY=VALUE"):
        harness("plan").parse_change("epochs")
    with pytest.raises(ValueError, match="not YAML"):
        harness("plan").parse_change("epochs={")


def test_the_command_line_names_what_is_wrong(capsys, harness):
    with pytest.raises(SystemExit):
        harness("command").main(experiment("ignn_graphs"), ["--runs", "ugp"])
    assert "unknown 'ugp' (did you mean 'upg'?)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--set", "epochs=0"], "0 steps, evaluated every 4; expected at least 1"),
        (["--set", "grad=ugp"], r"ignn_graphs, upg: unknown strategy 'ugp'.*did you mean 'upg'"),
        (["--set", "dataset=FOO"], "dataset='FOO'; expected COX2"),
        (
            ["--set", "dataset=COX2", "--data", "nowhere"],
            "--data nowhere is not a folder; expected",
        ),
        (["--repeats", "99"], "fold 99 of generated graphs; expected 0 to 9"),
    ],
)
def test_settings_that_cannot_be_are_one_line(argv, message, tmp_path, harness):
    command = ["--runs", "upg", "--out", str(tmp_path), *argv]
    with pytest.raises(SystemExit, match=message):
        harness("command").main(experiment("ignn_graphs"), command)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--minutes", "-1"], "--minutes -1.0 --time 0; expected 0 or more"),
        (["--time", "-1"], "expected 0 or more"),
        (["--device", "gpu"], "--device gpu; expected cpu, cuda or auto"),
        (["--set", "lr=fast"], "lr='fast'; expected float"),
    ],
)
def test_arguments_that_cannot_be_are_refused(argv, message, capsys, harness):
    with pytest.raises(SystemExit):
        harness("command").main(experiment("ignn_graphs"), argv)
    assert message in capsys.readouterr().err


def test_an_interrupted_command_says_that_it_can_go_on(tmp_path, monkeypatch, harness):
    command = harness("command")

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "train", interrupted)
    with pytest.raises(SystemExit, match="the same command goes on from"):
        command.main(experiment("ignn_graphs"), ["--runs", "upg", "--out", str(tmp_path)])


def test_inference_has_a_column_for_every_number_of_steps(harness):
    script, training = importlib.import_module("mdeq_inference"), harness("training")
    history = [{"accuracy": 0.5, "accuracy_3": 0.25, "accuracy_10": 1.0, "residual": 0.1}]
    columns = script.columns([training.Record("upg", 0, {}, 1, history=history)])
    assert [c.title for c in columns] == [
        "accuracy (%), no step",
        "3 steps",
        "10 steps",
        "residual",
    ]
    assert columns[2].of(training.Record("upg", 0, {}, 1, history=history)) == 100


def test_cosine_is_that_of_pytorch(harness):
    parameter = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], 0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20, eta_min=1e-6)
    for step in range(20):
        ours = harness("schedule").cosine(step, 20, 0.1, 1e-6)
        assert ours == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        scheduler.step()
    rates = [harness("schedule").cosine(step, 20, 0.1, warmup=4) for step in range(21)]
    assert rates[:5] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
    assert rates[20] == pytest.approx(0)


# --- data ----------------------------------------------------------------------------------------


def jpeg(pixels):
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=95)
    return buffer.getvalue()


@pytest.fixture
def archive(tmp_path):
    """An archive as the data folder has it, and the pixels that its images decode to."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    content, pixels = {"classes": np.array(list("abc"))}, {}
    for split, count in (("train", 5), ("test", 3)):
        files = [jpeg(random.integers(0, 255, (32, 32, 3), dtype="uint8")) for _ in range(count)]
        content[f"{split}_jpeg"] = np.frombuffer(b"".join(files), dtype="uint8")
        content[f"{split}_offsets"] = np.cumsum([0, *map(len, files)])
        content[f"{split}_labels"] = np.arange(count) % 3
        pixels[split] = np.stack([np.asarray(Image.open(io.BytesIO(f))) for f in files])
    path = tmp_path / "images.npz"
    np.savez(path, **content)
    return path, pixels


def test_archive_of_jpegs(archive, harness):
    path, pixels = archive
    train, test = harness("images").load_images("cifar10", path, 4, 0, 32)
    assert (len(train.labels), len(test.labels), train.classes) == (4, 3, 3)
    mean, std = (torch.tensor(m)[:, None, None] for m in harness("images").CIFAR10)
    expected = torch.from_numpy(pixels["train"][[3, 1]]).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(train.batch(torch.tensor([3, 1])) * std + mean, expected)


def test_torchvisions_folder(tmp_path, harness):
    import numpy as np

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (6, 2, 3072), dtype="uint8")
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        batch = {b"data": pixels[i], b"labels": [i, 9 - i]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    train, test = harness("images").load_images("cifar10", tmp_path, 0, 1, 32)
    assert train.labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert test.labels.tolist() == [5]
    assert torch.equal(test.pixels[0], torch.from_numpy(pixels[5, 0].reshape(3, 32, 32)))
    (folder / "test_batch").write_bytes(pickle.dumps({b"data": print, b"labels": []}))
    with pytest.raises(SystemExit, match=r"asks for builtins\.print"):
        harness("images").load_images("cifar10", tmp_path, 0, 0, 32)


def test_images_are_averaged_to_a_smaller_side(archive, harness):
    path, pixels = archive
    images, _ = harness("images").load_images("cifar10", path, 1, 0, 16)
    blocks = pixels["train"][0].reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))
    expected = torch.from_numpy(blocks).permute(2, 0, 1)
    assert (images.pixels[0] - expected).abs().max() <= 0.5
    with pytest.raises(ValueError, match="image_size=12 of cifar10; expected 32 or a divisor"):
        harness("images").load_images("cifar10", path, 1, 0, 12)


def test_digits_are_scikit_learns_in_another_order(harness):
    from sklearn.datasets import load_digits

    load = harness("images").load_images
    train, test = load("digits", None, 1000, 797, 8)
    known = load_digits()
    pairs = zip(known.images, known.target, strict=True)
    given = {(tuple(image.ravel()), label) for image, label in pairs}
    for part in (train, test):
        grey = part.pixels[:, 0].double().mul(16 / 255).ceil().flatten(1)
        found = zip(grey.tolist(), part.labels.tolist(), strict=True)
        assert {(tuple(g), y) for g, y in found} <= given
        assert torch.equal(part.pixels[:, 0], part.pixels[:, 2])
    both = torch.cat([train.pixels, test.pixels])[:, 0].flatten(1)
    assert len(both.unique(dim=0)) == len({image for image, _ in given})
    every = train.batch(torch.arange(1000))
    assert abs(float(every.mean())) < 0.05
    assert abs(float(every.std()) - 1) < 0.05
    with pytest.raises(SystemExit, match="1000 digits and 798 to test on; there are 1797"):
        load("digits", None, 1000, 798, 8)
    with pytest.raises(ValueError, match="image_size=16 of digits; expected 8"):
        load("digits", None, 1000, 797, 16)


def test_missing_data_are_described(tmp_path, harness):
    load = harness("images").load_images
    with pytest.raises(SystemExit, match=r"needs --data PATH: the archive cifar10-jpeg\.npz"):
        load("cifar10", None, 0, 0, 32)
    with pytest.raises(SystemExit, match="is not there"):
        load("folder", tmp_path / "nothing", 0, 0, 32)
    with pytest.raises(SystemExit, match="one subfolder of images per class"):
        load("folder", tmp_path, 0, 0, 32)
    with pytest.raises(ValueError, match="dataset='mnist'; expected cifar10"):
        load("mnist", None, 0, 0, 32)
    with pytest.raises(SystemExit, match="dataset=cifar10"):
        load("generated", tmp_path, 4, 4, 8)
    with pytest.raises(SystemExit, match=r"wiki\.txt needs --data DIR"):
        harness("text").load_text(None, "wiki.txt", "wiki.txt")
    (tmp_path / "text").touch()
    with pytest.raises(SystemExit, match=r"text is no archive; expected the archive cifar10-jpeg"):
        load("cifar10", tmp_path / "text", 0, 0, 32)
    for path in (tmp_path, tmp_path / "text"):
        with pytest.raises(SystemExit, match=r"wiki\.txt cannot be read: .*; expected a folder"):
            harness("text").load_text(path, "wiki.txt", "wiki.txt")


def test_augmentation_is_a_crop_of_the_framed_image_flipped_or_not(harness):
    images = harness("images")
    plain = images.generate(12, seed=0, size=8)
    original = plain.batch(torch.arange(12))
    found = plain.batch(torch.arange(12), torch.Generator().manual_seed(0))
    framed = torch.nn.functional.pad(original, (4,) * 4)
    placed = []
    for new, old in zip(found, framed, strict=True):
        crops = {
            (top, left, flip): (
                old[:, top : top + 8, left : left + 8].flip(2)
                if flip
                else (old[:, top : top + 8, left : left + 8])
            )
            for top in range(9)
            for left in range(9)
            for flip in (False, True)
        }
        placed += [[place for place, crop in crops.items() if torch.equal(crop, new)]]
    assert all(placed)
    assert len({tuple(places) for places in placed}) > 6  # drawn for each image


def test_folder_of_images(tmp_path, harness):
    import numpy as np
    from PIL import Image

    for split in ("train", "val"):
        for name, color in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                pixels = np.full((20 + i, 30, 3), color, dtype="uint8")
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    images = harness("images")
    train, test = images.load_images("folder", tmp_path, 0, 0, 16)
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]  # blue, red
    mean, std = (torch.tensor(m)[:, None, None] for m in images.IMAGENET)
    for found in (
        test.batch(torch.arange(6)),
        train.batch(torch.arange(6), torch.Generator().manual_seed(0)),
    ):
        assert found.shape == (6, 3, 16, 16)
        colors = (found * std + mean).mean(dim=(2, 3))
        torch.testing.assert_close(colors[0], torch.tensor([0.0, 0.0, 1.0]), atol=1e-5, rtol=0)
        torch.testing.assert_close(colors[5], torch.tensor([1.0, 0.0, 0.0]), atol=1e-5, rtol=0)


def test_text(tmp_path, harness):
    text = harness("text")
    (tmp_path / "a.txt").write_text("b a <unk> b\n\nb c\n")
    (tmp_path / "b.txt").write_text("c new b\n")
    train, test, count = text.load_text(tmp_path, "a.txt", "b.txt")
    assert count == 5  # <unk>, b, <eos>, a, c
    assert train.tolist() == [1, 3, 0, 1, 2, 2, 1, 4, 2]  # an empty line is a line
    assert test.tolist() == [4, 0, 1, 2]
    texts = text.columns(torch.arange(21), 2)
    assert texts.tolist() == [list(range(10)), list(range(10, 20))]
    assert text.segments(texts, 3) == 3
    assert text.segment(texts, 1, 3).tolist() == [[3, 4, 5, 6], [13, 14, 15, 16]]
    assert torch.equal(text.segment(texts, 4, 3), text.segment(texts, 1, 3))
    with pytest.raises(SystemExit, match="expected at least 22"):
        text.segments(texts, 10)


def test_characters_and_the_last_tenth_of_a_text(tmp_path, harness):
    (tmp_path / "a.txt").write_text("ab\n" * 8 + "b a\nbz\n")
    train, test, count = harness("text").load_text(tmp_path, "a.txt", "", characters=True)
    assert count == 5  # <unk>, a, b, <eos>, the space
    assert train.tolist() == [1, 2, 3] * 8 + [2, 4, 1, 3]
    assert test.tolist() == [2, 0, 3]


def test_zipped_graphs_are_unpacked_and_nothing_else(tmp_path, monkeypatch, harness):
    import zipfile

    monkeypatch.chdir(tmp_path)
    rows = {
        "A": "1, 2\n2, 1\n3, 4\n4, 3\n",
        "graph_indicator": "1\n1\n2\n2\n",
        "graph_labels": "1\n2\n",
        "node_labels": "0\n1\n1\n0\n",
    }
    with zipfile.ZipFile(tmp_path / "COX2.zip", "w") as packed:
        for name, content in rows.items():
            packed.writestr(f"COX2/COX2_{name}.txt", content)
        packed.writestr("../COX2_escape.txt", "")
        packed.writestr("evil.py", "")
    found = harness("graph")._tu(tmp_path, "COX2")
    assert len(found) == 2
    assert found[0].x.shape == (2, 2)
    assert not list(tmp_path.parent.glob("COX2_escape.txt"))
    assert not list(tmp_path.rglob("evil.py"))


def test_graphs_that_cannot_be_downloaded_leave_nothing_behind(tmp_path, monkeypatch, harness):
    datasets = pytest.importorskip("torch_geometric.datasets")

    def without_network(root, *_, **__):
        (Path(root) / "COX2" / "raw").mkdir(parents=True)
        raise OSError("no network")

    monkeypatch.setattr(datasets, "TUDataset", without_network)
    with pytest.raises(SystemExit, match=r"COX2 can be neither .* \(no network\); .* COX2\.zip"):
        harness("graph")._tu(tmp_path, "COX2")
    assert not list(tmp_path.iterdir())


def test_folds_are_the_same_for_all_methods_and_cover_all_graphs(harness):
    graph = harness("graph")
    plan = harness("plan").load_plan(FOLDER / "ignn_graphs.yaml", "smoke", graph.GraphSettings)
    tests = []
    for fold in range(10):
        (train, test), *_ = graph.load_graphs(plan.runs["upg"], fold, None)
        assert sum(b.num_graphs for b in train) + sum(b.num_graphs for b in test) == 120
        tests.append(torch.cat([b.x.flatten() for b in test]))
    assert sum(len(x) for x in tests) == 120 * 12 * 4
    other, *_ = graph.load_graphs(plan.runs["ift"], 3, None)
    assert torch.equal(torch.cat([b.x.flatten() for b in other[1]]), tests[3])
    with pytest.raises(ValueError, match="fold 10 of generated graphs; expected 0 to 9"):
        graph.load_graphs(plan.runs["upg"], 10, None)


def test_graphs_that_are_sorted_by_class_are_shuffled(tmp_path, monkeypatch, harness):
    graph, plan = harness("graph"), harness("plan")
    by_class = sorted(graph._generated_graphs(), key=lambda one: int(one.y))
    monkeypatch.setattr(graph, "_tu", lambda path, name: by_class)
    runs = plan.load_plan(FOLDER / "ignn_graphs.yaml", "cpu", graph.GraphSettings).runs
    settings = dataclasses.replace(runs["COX2-upg"], batch_size=20)
    (train, _), *_ = graph.load_graphs(settings, 0, tmp_path)
    assert [len(batch.y) for batch in train] == [20] * 5 + [8]
    assert all(0.15 < batch.y.float().mean() < 0.85 for batch in train)


def test_graphs_of_nodes_come_in_another_order_in_each_epoch(monkeypatch, harness):
    graph, plan = harness("graph"), harness("plan")
    runs = plan.load_plan(FOLDER / "ignn_ppi.yaml", "smoke", graph.GraphSettings).runs
    task = graph.GraphTask(runs["upg"], 0, None, CPU)
    seen = []
    scores = task._scores
    monkeypatch.setattr(task, "_scores", lambda batch, g: seen.append(batch) or scores(batch, g))
    for number in range(15):
        task.step(number)
    places = [[batch for batch, _ in task.splits[0]].index(batch) for batch in seen]
    epochs = [places[i : i + 3] for i in range(0, 15, 3)]
    assert all(sorted(epoch) == [0, 1, 2] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


# --- other libraries -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("silva", "layer='silva'; expected torchdeq, or one of phantom_grad, silva-phantom"),
        ("phantom_grad", "layer='phantom_grad': no checkout of Gsunshine/phantom_grad in .hosts"),
    ],
)
def test_a_layer_that_cannot_be_had_is_one_line(layer, message, tmp_path, harness, monkeypatch):
    monkeypatch.setenv("DEQ_PHANTOM_HOSTS", str(tmp_path))
    command = ["--runs", "torchdeq-ift", "upg", "--out", str(tmp_path), "--set", f"layer={layer}"]
    with pytest.raises(SystemExit, match=f"time_to_accuracy, torchdeq-ift: {message}"):
        harness("command").main(experiment("time_to_accuracy"), command)


def test_a_layer_of_others_trains_the_network_and_tells_its_residuals(harness):
    from torchdeq import get_deq

    model = harness("vision").MDEQ.from_preset("tiny")

    class Others(nn.Module):  # TorchDEQ's own phantom gradient, in the place of another library's
        def __init__(self):
            super().__init__()
            self.deq = [get_deq(grad=2, f_max_iter=6)]

        def forward(self, func, start):
            return self.deq[0].train(self.training)(func, start)[0], {"rel_lowest": torch.zeros(1)}

    model.deq, images = harness("peers").Layer(Others()), torch.randn(2, 3, 16, 16)
    model(images).sum().backward()
    assert all(p.grad.count_nonzero() > 0 for p in model.layer.parameters())
    assert torch.equal(model.last.residual, torch.zeros(1))  # training is timed: nothing is added
    with torch.no_grad():
        model.eval()(images)
    state = model.last.equilibrium
    with torch.no_grad():
        images = model.equilibrium_func(model.last.injection, model.last.shared)(state)
    h, image = (torch.cat([x.flatten(1) for x in s], dim=1) for s in (state, images))
    torch.testing.assert_close(model.last.residual, (image - h).norm(dim=1) / image.norm(dim=1))


def test_training_that_begins_warm_tells_the_model_which_images_it_sees(harness):
    plan = harness("plan").load_plan(
        FOLDER / "time_to_accuracy.yaml",
        "smoke",
        harness("vision").VisionSettings,
        runs=["npg-warm"],
    )
    task = harness("vision").VisionTask(plan.runs["npg-warm"], 0, None, torch.device("cpu"))
    task.step(0)
    order = harness("processes").epoch_order(0, 0, 64)
    assert sorted(task.model.starts._rows) == sorted(order[:32].tolist())
    task.step(1)
    assert len(task.model.starts) == 64
    task.evaluate(2)
    assert len(task.model.starts) == 64


def test_reports_are_made_in_evaluations_only(harness):
    interval = harness("reports").report_interval
    assert (interval(0, 26), interval(26, 26), interval(78, 26)) == (26, 26, 78)
    for every in (10, 27, -26):
        with pytest.raises(
            ValueError, match=rf"report_every={every}; expected a multiple of the 26"
        ):
            interval(every, 26)
    with pytest.raises(ValueError, match="0 steps between evaluations; expected at least 1"):
        interval(0, 0)


@pytest.mark.parametrize(
    "name", ["time_to_accuracy", "auto_text", "auto_proteins", "recursive_sudoku"]
)
def test_each_kind_of_training_refuses_reports_between_evaluations(name, harness):
    experiment = importlib.import_module(name).EXPERIMENT
    plan = harness("plan").load_plan(
        FOLDER / f"{name}.yaml", "smoke", experiment.settings, {"report_every": 7}
    )
    with pytest.raises(ValueError, match="report_every=7; expected a multiple of the"):
        experiment.task(next(iter(plan.runs.values())), 0, None, torch.device("cpu"))


@pytest.mark.slow
def test_cosines_along_training_are_those_of_a_report(harness):
    """Of a model that begins warm too: test images are not taken for training images."""
    from torch.nn import functional as F

    changes = {"report_grads": ["npg(k=2)"], "report_every": 4, "report_images": 2}
    kind = harness("vision").VisionSettings
    plan = harness("plan").load_plan(
        FOLDER / "time_to_accuracy.yaml", "smoke", kind, changes, runs=["npg-warm"]
    )
    task = harness("vision").VisionTask(plan.runs["npg-warm"], 0, None, torch.device("cpu"))
    assert "cosine of npg(k=2)" not in task.evaluate(2)
    task.step(0)
    kept = len(task.model.starts)
    found = task.evaluate(4)
    assert len(task.model.starts) == kept
    images, labels = task.test_set.batch(torch.arange(2)), task.test_set.labels[:2]
    (report,) = dpp.model_report(
        task.model,
        {"x": images.contiguous(memory_format=torch.channels_last), "samples": [900, 901]},
        lambda logits: F.cross_entropy(logits, labels),
        ["npg(k=2)"],
        repeats=1,
    ).reports
    assert found["report_rho"] == pytest.approx(report.radius, rel=1e-3)
    assert found["cosine of npg(k=2)"] == pytest.approx(report.results[-1].cosine, abs=1e-3)


# --- training ------------------------------------------------------------------------------------

SMALL = {
    "mdeq_ablation": ["--runs", "ift-official", "--set", "train_images=48", "augment=true"],
    "deq_wikitext": ["--runs", "postln-upg-jr0.1", "--set", "dropout=0.1"],
    "ignn_graphs": ["--runs", "npg", "--repeats", "1"],
    "recursive_sudoku": ["--runs", "all-then-1", "--repeats", "1"],
}


def numbers(folder):
    """What the runs in a folder measured, without times."""
    return {
        path.relative_to(folder).parts[:-1]: [
            {k: v for k, v in row.items() if k not in ("seconds", "ms_per_step")}
            for row in json.loads(path.read_text())["history"]
        ]
        for path in folder.rglob("record.json")
    }


@pytest.mark.filterwarnings("ignore:h is no equilibrium")  # after so few evaluations
@pytest.mark.parametrize("name", list(SMALL))
def test_a_run_that_was_stopped_ends_with_the_numbers_of_one_that_was_not(
    name, tmp_path, capsys, harness
):
    main, argv = harness("command").main, [*SMALL[name], "--device", "cpu"]
    main(experiment(name), [*argv, "--out", str(tmp_path / "whole")])
    whole = numbers(tmp_path / "whole")
    stopped = [*argv, "--out", str(tmp_path / "parts")]
    main(experiment(name), [*stopped, "--minutes", "0"])
    assert "the same command goes on from here" in capsys.readouterr().out
    parts = numbers(tmp_path / "parts")
    assert all(2 == len(parts[key]) < len(whole[key]) for key in whole)
    main(experiment(name), stopped)
    assert numbers(tmp_path / "parts") == whole
    main(experiment(name), stopped)  # nothing is left to do
    assert numbers(tmp_path / "parts") == whole
    with pytest.raises(SystemExit, match=r"lr was .* and is 0\.5; drop it with --fresh"):
        main(experiment(name), [*stopped, "--set", "lr=0.5"])
    main(experiment(name), [*stopped, "--set", "lr=0.05", "--fresh"])
    assert numbers(tmp_path / "parts") != whole


class Counting:
    """A task whose loss is what it is told to be."""

    def __init__(self, losses):
        self.model = nn.Linear(1, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1)
        self.losses, self.steps, self.eval_every = losses, len(losses), 2

    def step(self, number):
        loss = self.losses[number]
        if isinstance(loss, Exception):
            raise loss
        if loss == "weights":
            nn.init.constant_(self.model.weight, float("nan"))
        self.last = loss
        return torch.tensor(1.0 if isinstance(loss, str) else loss)

    def evaluate(self, step):
        if step > 0 and self.last == "evaluation":
            raise ArithmeticError(self.last)
        return {"accuracy": 0.5}


@pytest.mark.parametrize(
    ("losses", "error"),
    [
        ([1.0, 2.0, float("nan"), 1.0, 1.0], "the mean loss of the last 2 steps is nan"),
        ([1.0, 2.0, RuntimeError("singular"), 1.0], "RuntimeError: singular"),
        ([1.0, 2.0, ValueError("no equilibrium"), 1.0], "ValueError: no equilibrium"),
        ([1.0, 2.0, 1.0, "weights", 1.0], "weights are not finite after 4 steps"),
        ([1.0, 2.0, 1.0, "evaluation", 1.0], "ArithmeticError: evaluation"),
    ],
)
def test_what_a_run_dies_of_is_recorded_and_kept(losses, error, tmp_path, harness):
    training, results = harness("training"), harness("results")
    task = Counting(losses)
    record = training.Record("a", 0, {"lr": 1.0}, task.steps)
    list(training.train(task, record, tmp_path / "a" / "0", CPU))
    assert record.error == error
    assert [row["step"] for row in record.history] == [0, 2]
    assert record.history[1]["train_loss"] == 1.5
    again = training.Record("a", 0, {"lr": 1.0}, task.steps)
    (tmp_path / "a" / "0" / "record.json").write_text("{}")  # as if killed just before it
    assert training.restore(task, again, tmp_path / "a" / "0")
    assert again == record
    assert again.is_done
    (loaded,) = results.load_records(tmp_path)
    assert loaded == record
    column = results.Column("accuracy", results.last("accuracy"))
    table = results.write(
        tmp_path, "x", [loaded], [column], [results.Curve("accuracy", "a")], [], {}
    )
    assert "0 (1 failed)" in table
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    (row,) = csv.DictReader((tmp_path / "runs.csv").read_text().splitlines())
    assert row == {
        "run": "a",
        "repeat": "0",
        "accuracy": "0.5",
        "steps": str(record.steps),
        "of": str(record.total),
        "seconds": "0.0",
        "error": error,
    }


def test_many_repeats_are_a_band_and_those_that_have_only_begun_are_left_out(harness, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes").Axes
    results, training = harness("results"), harness("training")
    histories = [[{"step": i, "y": float(i * seed)} for i in range(3)] for seed in range(5)]
    records = [
        training.Record("a", n, {}, 3, history=rows)
        for n, rows in enumerate([*histories, [{"step": 0}]])
    ]
    bands, lines = [], []
    monkeypatch.setattr(axes, "fill_between", lambda self, *band, **_: bands.append(band))
    draw = axes.plot
    monkeypatch.setattr(
        axes, "plot", lambda *args, **k: lines.append(args[1:3]) or draw(*args, **k)
    )
    assert results.plot(records, [results.Curve("y", "y")], [], "").startswith(b"\x89PNG")
    ((x, low, high),) = bands
    ((steps, mean),) = lines
    assert x == steps == [0, 1, 2]
    assert mean == [0, 2, 4]
    deviation = 2.5**0.5  # of 0 to 4
    assert low == pytest.approx([0, 2 - deviation, 4 - 2 * deviation])
    assert high == pytest.approx([0, 2 + deviation, 4 + 2 * deviation])


def test_a_run_that_memory_did_not_suffice_for_can_be_resumed(tmp_path, harness):
    training = harness("training")
    task = Counting([1.0, 1.0, torch.cuda.OutOfMemoryError("full"), 1.0])
    record = training.Record("a", 0, {}, task.steps)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="full"):
        list(training.train(task, record, tmp_path, CPU))
    again = training.Record("a", 0, {}, task.steps)
    assert training.restore(task, again, tmp_path)
    assert (again.steps, again.error) == (2, None)


def test_unfinished_runs_are_counted_and_not_averaged(tmp_path, harness):
    results, training = harness("results"), harness("training")
    rows = [{"step": 1, "ms_per_step": 5.0, "accuracy": 0.5}, {"step": 2, "ms_per_step": 7.0}]
    records = [
        training.Record("a", 0, {}, 2, steps=2, history=rows),
        training.Record("a", 1, {}, 2, steps=1, history=[{"step": 1, "ms_per_step": 9.0}]),
        training.Record("b", 0, {}, 2, steps=1, history=rows[:1]),
        *(training.Record("c", n, {}, 1, steps=1, history=[{"step": 1}]) for n in (0, 1)),
    ]
    columns = [results.Column("accuracy", results.last("accuracy"))]
    header, body = results.rows(records, columns, ["a", "b", "c"], {})
    assert header == ["run", "accuracy", "ms/step", "steps", "runs"]
    assert body == [
        ["a", "0.5", "6.0", "1 to 2", "1 (1 unfinished)"],
        ["b", "-", "-", "1", "0 (1 unfinished)"],
        ["c", "-", "-", "1", "2"],
    ]
    table = results.write(tmp_path, "x", records, columns, [results.Curve("accuracy", "a")], [], {})
    assert "1 unfinished" in table


def test_runs_of_other_settings_are_not_averaged(tmp_path, harness):
    upg = ["--runs", "upg", "--device", "cpu", "--out", str(tmp_path)]
    main = harness("command").main
    main(experiment("ignn_graphs"), [*upg, "--repeats", "0"])
    before = numbers(tmp_path)
    other = [*upg, "--set", "lr=0.02"]
    for repeats in (["0"], ["1"], ["1", "--fresh"]):
        with pytest.raises(SystemExit, match=r"upg/0 is of other settings: lr was .* and is 0\.02"):
            main(experiment("ignn_graphs"), [*other, "--repeats", *repeats])
    assert numbers(tmp_path) == before
    main(experiment("ignn_graphs"), [*other, "--repeats", "0", "--fresh"])
    assert numbers(tmp_path) != before


def test_step_times_stay_until_they_are_taken_again(tmp_path, harness):
    def call(*more):
        command = ["--repeats", "0", "--device", "cpu", "--out", str(tmp_path), *more]
        harness("command").main(experiment("ignn_graphs"), command)
        return harness("results").load_times(tmp_path / "smoke")

    assert call("--runs", "upg", "--minutes", "0", "--time", "1") == {}  # nothing is finished
    times = call("--runs", "upg", "npg", "--time", "2")
    assert {name: len(found) for name, found in times.items()} == {"upg": 2, "npg": 2}
    assert call("--runs", "npg") == times
    assert call("--runs", "npg", "--fresh") == {"upg": times["upg"]}


def test_failures_are_named_with_the_way_to_try_again(tmp_path, capsys, harness):
    command = ["--runs", "upg", "--repeats", "0", "--device", "cpu", "--out", str(tmp_path)]
    table = harness("command").main(experiment("ignn_graphs"), [*command, "--set", "lr=1e9"])
    assert "0 (1 failed)" in table
    said = capsys.readouterr().err
    assert re.search(r"upg 0 failed after \d+ of \d+ steps: .*; --fresh tries it again", said)


def test_an_unreadable_checkpoint_is_named(tmp_path, harness):
    command = ["--runs", "upg", "--repeats", "0", "--device", "cpu", "--out", str(tmp_path)]
    harness("command").main(experiment("ignn_graphs"), command)
    path = tmp_path / "smoke" / "upg" / "0" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SystemExit, match=r"checkpoint\.pt cannot be read: .*--fresh"):
        harness("command").main(experiment("ignn_graphs"), command)


def test_a_folder_that_cannot_be_written_is_named(tmp_path, harness):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"--out: .*file"):
        harness("command").main(experiment("ignn_graphs"), ["--out", str(tmp_path / "file")])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_one_line(capsys, harness):
    with pytest.raises(SystemExit):
        harness("command").main(experiment("ignn_graphs"), ["--device", "cuda"])
    assert "PyTorch sees no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mdeq_cifar10", "deq_wikitext"])
def test_pretraining_leaves_steps_to_train(name, tmp_path, harness):
    command = ["--device", "cpu", "--out", str(tmp_path), "--set", "pretrain_steps=1000"]
    with pytest.raises(SystemExit, match=r"pretrain_steps=1000 of \d+ steps; expected fewer"):
        harness("command").main(experiment(name), command)


@pytest.mark.parametrize("name", ["mdeq_cifar10", "deq_wikitext"])
def test_a_batch_that_processes_cannot_share_is_refused_before_training(
    name, tmp_path, monkeypatch, harness
):
    command = ["--device", "cpu", "--out", str(tmp_path), "--set", "batch_size=3"]
    monkeypatch.setattr(harness("processes"), "count", lambda: 2)
    with pytest.raises(SystemExit, match="a batch of 3 for 2 processes"):
        harness("command").main(experiment(name), command)


def test_nothing_is_dropped_for_a_command_that_cannot_be(tmp_path, harness):
    command = ["--runs", "upg", "--repeats", "0", "--device", "cpu", "--out", str(tmp_path)]
    main = harness("command").main
    main(experiment("ignn_graphs"), command)
    before = numbers(tmp_path)
    for wrong in (["--set", "grad=ugp"], ["--data", str(tmp_path)], ["--repeats", "0", "99"]):
        with pytest.raises(SystemExit):
            main(experiment("ignn_graphs"), [*command, "--fresh", *wrong])
    assert numbers(tmp_path) == before


def test_the_best_of_a_history_and_where_another_is_best(harness):
    results, training = harness("results"), harness("training")
    rows = [{"f1": 0.1, "v": 0.3}, {"f1": 0.9, "v": 0.2}, {"f1": 0.5, "v": 0.7}]
    record = training.Record("a", 0, {}, 3, history=rows)
    assert results.best("f1", 100)(record) == 90
    assert results.best("f1", 100, by="v")(record) == 50
    assert results.best("f1", choose=min)(record) == 0.1
    assert results.last("f1")(record) == 0.5


@pytest.mark.filterwarnings("ignore:h is no equilibrium")  # after so few evaluations
def test_a_run_in_the_time_of_another_takes_the_steps_that_fit(tmp_path, harness, monkeypatch):
    command = harness("command")
    monkeypatch.setattr(
        command,
        "step_times",
        lambda tasks, rounds, device: {
            name: [0.1 if name == "upg" else 0.25] * 3 for name in tasks
        },
    )
    runs = ["--runs", "upg", "ift-in-time-of-upg", "--set", "radius_images=0", "test_images=4"]
    command.main(experiment("mdeq_ablation"), [*runs, "--out", str(tmp_path), "--device", "cpu"])
    found = {r.name: r for r in harness("results").load_records(tmp_path / "smoke")}
    assert found["upg"].steps == 8
    assert found["ift-in-time-of-upg"].steps == found["ift-in-time-of-upg"].total == 3


def test_a_run_needs_the_one_whose_time_it_takes(capsys, harness):
    with pytest.raises(SystemExit):
        harness("command").main(experiment("mdeq_ablation"), ["--runs", "ift-in-time-of-upg"])
    message = "ift-in-time-of-upg takes the time of upg; expected upg among --runs"
    assert message in capsys.readouterr().err


def test_accuracy_is_measured_at_epochs_ends_and_radii_more_often(tmp_path, harness):
    command = ["--runs", "upg", "--device", "cpu", "--set", "radius_every=2", "eval_epochs=2"]
    harness("command").main(experiment("mdeq_ablation"), [*command, "--out", str(tmp_path)])
    (record,) = harness("results").load_records(tmp_path / "smoke")
    assert [row["step"] for row in record.history] == [0, 2, 4, 6, 8]
    assert all({"rho", "rho_max", "rho_damped"} <= set(row) for row in record.history)
    assert [row["step"] for row in record.history if "accuracy" in row] == [8]


def test_micro_f1_is_sklearns(harness):
    metrics = pytest.importorskip("sklearn.metrics")
    scores, labels = torch.randn(30, 5), torch.randint(2, (30, 5)).float()
    expected = metrics.f1_score(labels, (scores > 0).float(), average="micro")
    assert harness("graph")._micro_f1(scores, labels) == pytest.approx(expected)


def test_times_are_taken_in_turn(harness):
    order = []

    class Logging(Counting):
        def step(self, number):
            order.append((self.name, number))
            return torch.zeros(())

    tasks = {}
    for name in "ab":
        tasks[name] = (Logging([1.0]), 7)
        tasks[name][0].name = name
    times = harness("training").step_times(tasks, 2, CPU)
    assert order == [(name, step) for step in (7, 8, 9) for name in "ab"]
    assert {name: len(found) for name, found in times.items()} == {"a": 2, "b": 2}


# --- scripts, as users call them -----------------------------------------------------------------


def call(command, folder, **more):
    root = FOLDER.parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), **more}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_smoke(name, tmp_path):
    done = call([sys.executable, str(FOLDER / f"{name}.py"), "--time", "1"], tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "experiments" / name / "smoke"
    found = json.loads((folder / "results.json").read_text())
    assert found["runs"]
    for record in found["runs"]:
        assert record["error"] is None
        assert record["steps"] == record["total"]
        assert all(value is not None for row in record["history"] for value in row.values())
        where = folder / record["name"] / str(record["repeat"])
        assert list(where.glob("events.out.tfevents*"))
    assert set(found["step seconds, taken in turn"]) == {r["name"] for r in found["runs"]}
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "table.md").read_text().count("\n") == 2 + len(
        {r["name"] for r in found["runs"]}
    )


@pytest.mark.slow
def test_two_processes_train_as_one_on_the_joint_batch(tmp_path, harness):
    script = [str(FOLDER / "deq_wikitext.py"), "--runs", "postln-upg-jr0.1", "--device", "cpu"]
    script += ["--set", "dropout=0.0", "attention_dropout=0.0", "jac_weight=0.0"]
    one = call([sys.executable, *script, "--out", "one"], tmp_path)
    assert one.returncode == 0, one.stderr
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    two = call([*torchrun, *script, "--out", "two"], tmp_path)
    assert two.returncode == 0, two.stderr
    (single,), (double,) = (numbers(tmp_path / folder).values() for folder in ("one", "two"))
    assert len(single) == len(double) == 3
    for a, b in zip(single, double, strict=True):
        for key in ("loss", "train_loss", "perplexity"):
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=1e-4)


@pytest.mark.slow
def test_processes_share_out_folds(tmp_path, harness):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = [str(FOLDER / "ignn_graphs.py"), "--device", "cpu", "--out", "out"]
    done = call([*torchrun, *script], tmp_path)
    assert done.returncode == 0, done.stderr
    records = harness("results").load_records(tmp_path / "out" / "smoke")
    assert [(r.name, r.repeat) for r in records] == [
        (name, fold) for name in ("ift", "npg", "upg") for fold in (0, 1)
    ]
    for record in records:  # one of the processes trained it
        folder = tmp_path / "out" / "smoke" / record.name / str(record.repeat)
        assert len(list(folder.glob("events.out.tfevents*"))) == 1


@pytest.mark.slow
def test_processes_agree_on_the_steps_that_fit_into_a_time(tmp_path, harness):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = [str(FOLDER / "mdeq_ablation.py"), "--runs", "upg", "ift-in-time-of-upg"]
    more = ["--set", "radius_images=0", "test_images=4", "--device", "cpu", "--out", "out"]
    more += ["--time", "2"]  # which all processes take part in
    done = call([*torchrun, *script, *more], tmp_path)
    assert done.returncode == 0, done.stderr
    records = harness("results").load_records(tmp_path / "out" / "smoke")
    assert {record.name for record in records} == {"upg", "ift-in-time-of-upg"}
    assert all(record.steps == record.total >= 1 for record in records)
    times = json.loads((tmp_path / "out" / "smoke" / "results.json").read_text())
    assert {len(found) for found in times["step seconds, taken in turn"].values()} == {2}


@pytest.mark.slow
def test_what_processes_measure_together_is_what_their_checkpoint_shows_alone(tmp_path, harness):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = [str(FOLDER / "mdeq_ablation.py"), "--runs", "upg", "--device", "cpu", "--out", "out"]
    # Running means of each process's own samples would tell in evaluations.
    done = call([*torchrun, *script, "--set", "radius_images=0", "test_images=16"], tmp_path)
    assert done.returncode == 0, done.stderr
    (record,) = harness("results").load_records(tmp_path / "out" / "smoke")
    ablation, training = experiment("mdeq_ablation"), harness("training")
    task = ablation.task(ablation.settings(**record.settings), record.repeat, None, CPU)
    again = training.Record(record.name, record.repeat, record.settings, record.total)
    assert training.restore(task, again, tmp_path / "out" / "smoke" / "upg" / "0")
    found = task.evaluate(record.total)
    # Sums in another order differ by 2e-7, buffers of different processes by 7e-4.
    assert {key: record.history[-1][key] for key in found} == pytest.approx(found, rel=1e-5)
