"""The comparison: its data, its memory figure, its files, and a small run."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

import deq_phantom_plugin as dpp
from deq_phantom_plugin.cli import main
from deq_phantom_plugin.compare import Settings, compare, load_digits, load_folder, table
from deq_phantom_plugin.compare.report import write
from deq_phantom_plugin.compare.training import MethodResult
from deq_phantom_plugin.diagnostics.measure.cost import peak_bytes

CPU = torch.device("cpu")
FAST = {"f_solver": "fixed_point_iter", "f_max_iter": 4}


# --- data -------------------------------------------------------------------------------------


def test_digits():
    data = load_digits()
    assert data.train_images.shape[1:] == (1, 8, 8)
    assert len(data.train_labels) + len(data.test_labels) == 1797
    assert data.classes == tuple("0123456789")
    # Stratified: every class gives the same share.
    shares = data.test_labels.bincount() / (
        data.test_labels.bincount() + data.train_labels.bincount()
    )
    torch.testing.assert_close(shares, torch.full((10,), 0.2), atol=0.01, rtol=0)
    assert abs(float(data.train_images.mean())) < 1e-5
    again = load_digits()
    assert torch.equal(again.test_images, data.test_images)


@pytest.fixture
def folder(tmp_path):
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for index, name in enumerate(["dark", "light"]):
        (tmp_path / name).mkdir()
        for i in range(10):
            pixels = torch.rand(12, 9, 3, generator=generator) * 60 + 150 * index
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(tmp_path / name / f"{i}.png")
    return tmp_path


def test_folder(folder):
    data = load_folder(folder, 16)
    assert data.classes == ("dark", "light")
    assert data.train_images.shape == (16, 3, 16, 16)
    assert data.test_labels.bincount().tolist() == [2, 2]
    dark, light = (data.train_images[data.train_labels == label].mean() for label in (0, 1))
    assert dark < 0 < light


def test_the_first_images_of_a_folder_are_of_all_its_classes(tmp_path):
    from PIL import Image

    for index, name in enumerate("abcd"):
        (tmp_path / name).mkdir()
        for i in range(80):
            Image.new("RGB", (4, 4), (40 * index, i, 0)).save(tmp_path / name / f"{i}.png")
    data, again = load_folder(tmp_path, 4), load_folder(tmp_path, 4)
    assert data.test_labels.bincount().tolist() == [16, 16, 16, 16]
    for labels in (data.test_labels[:32], data.train_labels[:64]):
        assert labels.bincount(minlength=4).min() >= len(labels) // 10
    # Red tells the class, so each image has its own label still.
    for images, labels in (
        (data.train_images, data.train_labels),
        (data.test_images, data.test_labels),
    ):
        order = images[:, 0, 0, 0].argsort()
        assert torch.equal(labels[order], labels.sort().values)
    assert torch.equal(data.train_images, again.train_images)
    assert torch.equal(data.test_labels, again.test_labels)


def test_bad_folders(folder, tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        load_folder(tmp_path / "nowhere", 16)
    (folder / "dark" / "3.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"3\.png cannot be read"):
        load_folder(folder, 16)
    (folder / "empty").mkdir()
    (folder / "dark" / "3.png").unlink()
    with pytest.raises(ValueError, match="empty has 0 images"):
        load_folder(folder, 16)
    with pytest.raises(ValueError, match="expected one per class"):
        load_folder(folder / "dark", 16)


# --- memory -----------------------------------------------------------------------------------


def test_peak_bytes_of_known_cases():
    def alive_together():
        a = torch.zeros(1000)
        b = torch.zeros(500)
        return a, b

    def one_after_the_other():
        a = torch.zeros(1000)
        del a
        return torch.zeros(500)

    def views():
        a = torch.zeros(1000)
        return a.view(10, 100)[2:5].t(), a[::2]

    old = torch.zeros(1000)
    assert peak_bytes(alive_together, CPU) == 6000
    assert peak_bytes(one_after_the_other, CPU) == 4000
    assert peak_bytes(views, CPU) == 4000
    assert peak_bytes(lambda: old.view(-1)[3:], CPU) == 0


# Eight float32 with int64 indices: a pair of indices each, or one and pointers, or blocks of 2 x 2.
@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("coo", 32 + 128),
        ("csr", 32 + 64 + 72),
        ("csc", 32 + 64 + 72),
        ("bsr", 64 + 32 + 40),
        ("bsc", 64 + 32 + 40),
    ],
)
def test_peak_bytes_of_sparse_tensors(layout, expected):
    block = [(2, 2)] if layout.startswith("bs") else []
    old = getattr(torch.eye(8), f"to_sparse_{layout}")(*block)
    assert peak_bytes(old.clone, CPU) == expected
    assert peak_bytes(old.detach, CPU) == 0


def test_peak_bytes_sees_backward():
    x = torch.zeros(1000, requires_grad=True)
    forward = peak_bytes(lambda: x.exp(), CPU)
    both = peak_bytes(lambda: x.exp().exp().sum().backward(), CPU)
    assert forward == 4000
    assert both >= 12_000  # two results and a gradient at least


def test_peak_bytes_tells_npg_from_upg():
    weight = (0.01 * torch.randn(64, 64)).requires_grad_()
    state = torch.zeros(512, 64)

    def peak(spec):
        def step():
            dpp.attach(lambda h: torch.tanh(h @ weight), state, grad=spec).sum().backward()

        return peak_bytes(step, CPU)

    assert peak("npg(k=20)") == peak("npg(k=10)")
    assert peak("upg(k=20)") > 1.8 * peak("upg(k=10)")
    assert peak("upg(k=20, checkpoint=True)") < peak("upg(k=20)")


# --- runs -------------------------------------------------------------------------------------


def test_same_seed_same_run():
    data = load_digits()
    settings = Settings(steps=2, batch_size=8, deq=FAST)
    first = compare(["upg(k=2)", "npg(k=2)"], data, settings)
    second = compare(["npg(k=2)"], data, settings)
    assert first[1].losses == second[0].losses
    ramped = compare(["ramp('npg', {'k': (2, 4)}, until=1.0)"], data, settings)
    assert ramped[0].losses == second[0].losses  # a fraction of these steps, k=2 in the first
    # All methods start from the same model and batch: npg's value is h*, upg's two steps on.
    assert first[0].losses[0] == pytest.approx(first[1].losses[0], rel=0.2)
    for result in first:
        assert len(result.losses) == len(result.seconds) == 2
        assert 0 < result.backward_share < 1
        assert 0 <= result.accuracy <= 1
        assert -1 <= result.cosine <= 1
        assert result.peak_bytes > 0


def test_invalid_specs_and_presets_stop_before_training():
    data = load_digits()
    steps = []
    with pytest.raises(ValueError, match="unknown strategy 'upq'"):
        compare(["upg", "upq"], data, Settings(steps=1), lambda *args: steps.append(args))
    with pytest.raises(ValueError, match="unknown preset"):
        compare(["upg"], data, Settings(preset="huge"), lambda *args: steps.append(args))
    with pytest.raises(ValueError, match="multiples of"):
        compare(["upg"], data, Settings(preset="small"), lambda *args: steps.append(args))
    assert not steps


def result(**changes) -> MethodResult:
    values = {
        "spec": "upg",
        "step_seconds": 0.1234,
        "backward_share": 0.5,
        "accuracy": 0.95,
        "cosine": 0.98,
        "exact_residual": 1e-9,
        "peak_bytes": 3 * 2**20,
        "losses": [2.0, 1.0],
        "seconds": [0.1, 0.2],
    }
    return MethodResult(**{**values, **changes})


def test_table_names_what_fell_short():
    text = table([result(), result(spec="jfb", accuracy=0.4, exact_residual=0.2)])
    assert "123.4" in text
    assert "not above 90% test accuracy: jfb (40.0%)" in text
    assert "above 1e-02: jfb: 2e-01" in text
    assert text.count("0.9800") == 1
    assert "No cosine" not in table([result()])
    assert "0.9800" not in table([result(exact_residual=float("nan"))])
    assert "every method ended above 90% test accuracy" in table([result()])
    assert "accuracy:" not in table([result(accuracy=0.1)], target=None)


def test_the_plot_says_that_its_curve_is_a_mean(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    subplots, kept = pyplot.subplots, []

    def keep(**settings):
        kept.append(subplots(**settings))
        return kept[-1]

    monkeypatch.setattr(pyplot, "subplots", keep)
    losses = [2.0, 1.0, 3.0]
    write([result(losses=losses, seconds=[0.1, 0.2, 0.3])], tmp_path, "title")
    ((_, axes),) = kept
    assert "running mean, about 10 steps" in axes.get_ylabel()
    mean, raw = axes.lines
    assert list(raw.get_ydata()) == losses
    # Weights 0.9^t of the losses t steps ago, over their sum.
    weights = [0.81, 0.9, 1.0]
    expected = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)
    assert mean.get_ydata()[-1] == pytest.approx(expected)


def test_a_terminal_has_a_progress_bar(tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    arguments = ["compare", "--grad", "jfb", "--steps", "1", "--batch-size", "4"]
    arguments += ["--f-max-iter", "4", "--device", "cpu", "--out", str(tmp_path)]
    assert main(arguments) == 0
    assert "loss " in capsys.readouterr().out


def test_files_are_whole_or_as_they_were(tmp_path, monkeypatch):
    plot = write([result()], tmp_path / "out", "title")
    assert plot.read_bytes().startswith(b"\x89PNG")
    before = {path: path.read_bytes() for path in plot.parent.iterdir()}
    assert {path.name for path in before} == {"results.json", "steps.csv", "loss.png"}

    def full(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        write([result(accuracy=0.1)], tmp_path / "out", "title")
    assert {path: path.read_bytes() for path in plot.parent.iterdir()} == before


# --- the command line -------------------------------------------------------------------------


def test_compare_command(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["compare", "--grad", "npg(k=2)", "bptt(steps=2)", "--steps", "2"]
    arguments += ["--batch-size", "8", "--f-max-iter", "4", "--device", "cpu", "--out", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "npg(k=2)" in printed
    assert "not above 90% test accuracy" in printed
    assert f"plot: {out / 'loss.png'}" in printed
    assert "loss " not in printed  # no progress bar where nobody watches
    saved = json.loads((out / "results.json").read_text())
    assert [entry["spec"] for entry in saved] == ["npg(k=2)", "bptt(steps=2)"]
    assert (out / "steps.csv").read_text().count("\n") == 5


def test_compare_command_on_a_folder(folder, tmp_path, capsys):
    arguments = ["compare", "--grad", "jfb", "--steps", "1", "--batch-size", "4"]
    arguments += ["--data", str(folder), "--image-size", "8", "--f-max-iter", "4"]
    assert main([*arguments, "--device", "cpu", "--out", str(tmp_path / "o")]) == 0
    assert "2 classes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--grad", "upq"], "did you mean 'upg'"),
        (["--preset", "tinny"], "did you mean 'tiny'"),
        (["--data", "/no/such/folder"], "not a folder"),
        (["--steps", "0"], "at least 1"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, match, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["compare", *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert match in error
    assert "Traceback" not in error


def test_interrupting_keeps_what_is_finished(tmp_path, monkeypatch, capsys):
    from deq_phantom_plugin.compare import training

    train = training._train

    def interrupted(start, spec, *args):
        if spec == "npg":
            raise KeyboardInterrupt
        return train(start, spec, *args)

    monkeypatch.setattr(training, "_train", interrupted)
    arguments = ["compare", "--grad", "jfb", "npg", "--steps", "1", "--batch-size", "4"]
    arguments += ["--f-max-iter", "4", "--device", "cpu", "--out", str(tmp_path)]
    assert main(arguments) == 130
    assert [r["spec"] for r in json.loads((tmp_path / "results.json").read_text())] == ["jfb"]


@pytest.mark.parametrize("error", [ValueError("no equilibrium"), RuntimeError("out of memory")])
def test_a_method_that_fails_keeps_what_is_finished(tmp_path, monkeypatch, capsys, error):
    from deq_phantom_plugin.compare import training

    train = training._train

    def failing(start, spec, *args):
        if spec == "npg":
            raise error
        return train(start, spec, *args)

    monkeypatch.setattr(training, "_train", failing)
    arguments = ["compare", "--grad", "jfb", "npg", "upg", "--steps", "1", "--batch-size", "4"]
    arguments += ["--f-max-iter", "4", "--device", "cpu", "--out", str(tmp_path)]
    with pytest.raises((SystemExit, RuntimeError)) as stopped:
        main(arguments)
    if isinstance(error, ValueError):
        assert stopped.value.code == 2
        assert "no equilibrium" in capsys.readouterr().err
    else:
        assert stopped.value is error
    assert [r["spec"] for r in json.loads((tmp_path / "results.json").read_text())] == ["jfb"]


def test_list_command(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    specs = [line for line in lines if not line.startswith(" ")]
    assert [spec.partition("(")[0] for spec in specs] == dpp.list_strategies()
    described = [line for line in lines if line.startswith("    ")]
    assert len(described) >= len(specs)
    assert all(len(line.strip()) > 20 for line in described)


def test_missing_packages_are_named_with_the_pip_command(monkeypatch):
    import sys

    from deq_phantom_plugin._plumbing.extras import require

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "deq-phantom-plugin\[viz\]"'):
        require("matplotlib", "viz")


@pytest.mark.slow
@pytest.mark.filterwarnings("default::deq_phantom_plugin.ConvergenceWarning")  # ift, at first
@pytest.mark.filterwarnings("default:h is no equilibrium")  # likewise
def test_every_default_method_learns_the_digits():
    from deq_phantom_plugin.cli import _parser

    args = _parser().parse_args(["compare"])
    settings = Settings(
        steps=args.steps,
        deq={"f_solver": args.f_solver, "f_max_iter": args.f_max_iter, "f_stop_mode": "rel"},
    )
    results = compare(args.grad, load_digits(), settings)
    assert {r.spec: r.accuracy for r in results if r.accuracy <= 0.9} == {}


@pytest.mark.slow
def test_a_warning_is_given_once_for_all_methods(monkeypatch):
    monkeypatch.setattr("deq_phantom_plugin.compare.training.EXACT", "ift(max_iter=1)")
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        deq = {"f_solver": "broyden_fast", "f_max_iter": 1}
        settings = Settings(steps=1, batch_size=4, deq=deq)
        compare(["ift(max_iter=2)", "shine"], load_digits(), settings)
    texts = [str(w.message) for w in given]
    assert len([text for text in texts if "no equilibrium" in text]) == 1
