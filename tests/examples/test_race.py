"""Runs of examples/experiments that take their steps in turn: who goes on, and what is told."""

from __future__ import annotations

import csv
import importlib
import json
import math

import pytest
import torch
from torch import nn

from conftest import ROOT, load_example

pytest.importorskip("yaml")
pytest.importorskip("tensorboard")
pytest.importorskip("torchdeq")

FOLDER = ROOT / "examples" / "experiments"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def harness():
    return lambda name: importlib.import_module(f"harness.{name}")


class Climbing:
    """A task whose accuracy grows, and whose loss falls, by so much a step."""

    def __init__(self, rate, steps):
        self.model = nn.Linear(1, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1)
        self.rate, self.steps, self.eval_every, self.taken = rate, steps, 2, []

    def step(self, number):
        self.taken.append(number)
        return torch.tensor(10.0 - self.rate * number)

    def evaluate(self, step):
        return {"accuracy": self.rate * step}


@pytest.fixture
def raced(tmp_path, monkeypatch, harness):
    """Lets tasks race whose steps take so many seconds; returns their records and the order."""

    def run(rates, seconds, steps=8, is_over=lambda: False):
        training, race = harness("training"), harness("race")
        clock = [0.0]
        monkeypatch.setattr(training, "_now", lambda device: clock[0])
        order, runs, records = [], [], {}
        for name, rate in rates.items():
            task = Climbing(rate, steps)
            record = training.Record(name, 0, {}, steps)
            step = task.step

            def timed(number, name=name, step=step):
                clock[0] += seconds[name]
                order.append((number, name))
                return step(number)

            task.step = timed
            training.restore(task, record, tmp_path / name)
            records[name] = record
            runs.append((record, training.train(task, record, tmp_path / name, CPU)))
        list(race.run(race.Race("accuracy", "accuracy"), runs, 2, is_over))
        return records, order

    return run


def test_all_take_the_steps_of_the_base_in_turn(raced):
    _, order = raced({"ift": 1.0, "a": 1.0, "b": 1.0}, {"ift": 1, "a": 1, "b": 1})
    rounds = [order[i : i + 3] for i in range(0, 24, 3)]
    assert len(order) == 24
    assert [{number for number, _ in one} for one in rounds] == [{n} for n in range(8)]
    assert all({name for _, name in one} == {"ift", "a", "b"} for one in rounds)
    assert {one[0][1] for one in rounds} == {"ift", "a", "b"}  # each is first at times


def test_one_that_is_not_there_goes_on_until_it_is_or_out_of_time(raced, harness):
    rates = {"ift": 1.0, "slow": 0.75, "never": 0.1, "quick": 2.0}
    seconds = {"ift": 4.0, "slow": 1.0, "never": 2.0, "quick": 1.0}
    records, _ = raced(rates, seconds)
    race = harness("race").Race("accuracy", "accuracy")
    # Evaluated every second step; the level is the median of three, that of two steps before.
    assert race.level(records["ift"], 8) == 6.0
    assert records["ift"].steps == records["quick"].steps == 8
    assert records["slow"].steps == 10  # 0.75 * 8
    assert race.time_to(records["slow"], 6.0) == 10.0
    assert records["never"].steps == 16  # 32 seconds, those of ift
    assert race.time_to(records["never"], 6.0) == math.inf
    assert race.time_to(records["quick"], 6.0) == 4.0 + 1.0 - 1.0  # 4, 6 (median 6 at step 4)


def test_less_can_be_better(harness):
    race = harness("race").Race("perplexity", "perplexity", higher=False)
    record = harness("training").Record("a", 0, {}, 3, steps=3)
    record.history = [{"step": 0, "seconds": 0.0, "perplexity": 0.0}]
    record.history += [{"step": n, "seconds": 2.0 * n, "perplexity": 9.0 - n} for n in (1, 2, 3)]
    assert race.time_to(record, 7.5) == 4.0
    assert race.time_to(record, 7.0) == 6.0
    assert race.time_to(record, 6.0) == math.inf


def test_a_race_that_was_stopped_goes_on(raced):
    rates, seconds = {"ift": 1.0, "a": 0.75}, {"ift": 4.0, "a": 1.0}
    records, _ = raced(rates, seconds, is_over=lambda: True)
    assert [record.steps for record in records.values()] == [2, 2]
    records, order = raced(rates, seconds)
    assert order[0][0] == 2
    assert [record.steps for record in records.values()] == [8, 10]
    assert [row["step"] for row in records["a"].history] == [0, 2, 4, 6, 8, 10]


def test_a_base_that_fails_ends_the_race_at_its_length(raced, harness, monkeypatch):
    evaluate = Climbing.evaluate

    def failing(self, step):
        if self.rate == 1.0 and step == 4:
            raise ArithmeticError("singular")
        return evaluate(self, step)

    monkeypatch.setattr(Climbing, "evaluate", failing)
    records, _ = raced({"ift": 1.0, "a": 0.1}, {"ift": 1.0, "a": 1.0})
    assert "singular" in records["ift"].error
    assert records["a"].steps == 8
    race = harness("race").Race("accuracy", "accuracy")
    assert math.isnan(race.columns(list(records.values()))[0].of(records["a"]))


def test_a_run_that_goes_on_is_evaluated_as_often_as_before(raced):
    records, _ = raced({"ift": 1.0, "slow": 0.5}, {"ift": 4.0, "slow": 1.0}, steps=9)
    steps = [row["step"] for row in records["slow"].history]
    assert steps[:6] == [0, 2, 4, 6, 8, 9]  # 9 is the end of the base
    assert steps[6:] == list(range(10, steps[-1] + 1, 2))
    assert steps[-1] > 10


def test_without_the_base_each_takes_its_own_steps(raced, harness):
    records, _ = raced({"slow": 0.1, "quick": 2.0}, {"slow": 1.0, "quick": 1.0})
    assert records["slow"].steps == records["quick"].steps == 8
    columns = harness("race").Race("accuracy", "accuracy").columns(list(records.values()))
    assert columns[0].of(records["quick"]) == 12.0  # its own level: the median of 8, 12 and 16
    over = next(c for c in columns if c.title.startswith("time to ift"))
    assert math.isnan(over.of(records["quick"]))


def test_the_table_tells_times_over_those_of_the_base(raced, harness):
    records, _ = raced({"ift": 1.0, "a": 0.75, "b": 0.1}, {"ift": 4.0, "a": 1.0, "b": 2.0})
    columns = harness("race").Race("accuracy", "accuracy (%)").columns(list(records.values()))
    header, rows = harness("results").rows(list(records.values()), columns, ["ift", "a", "b"], {})
    times = ["time to ift's, over ift", "time to ift's training loss", "step over ift's"]
    assert header[1:5] == ["accuracy (%)", *times]
    assert rows[0][1:5] == ["6.0", "1.00", "1.00", "1.00"]
    # Medians of three means of two losses: 5.5 of `ift` after 8 steps, 5.1 of `a` after 10.
    assert rows[1][1:5] == ["4.5", f"{10 / 32:.2f}", f"{10 / 32:.2f}", "0.25"]
    assert rows[2][2:4] == ["not there (0 of 1 there)"] * 2


def test_a_race_is_of_one_process(harness, monkeypatch, tmp_path):
    monkeypatch.setattr(harness("processes"), "count", lambda: 2)
    auto_digits = importlib.import_module("auto_digits")
    with pytest.raises(SystemExit, match="with --repeats of its own"):
        harness("command").main(auto_digits.EXPERIMENT, ["--out", str(tmp_path)])


def test_a_race_of_graphs_is_resumed_and_tells_what_auto_chose(harness, tmp_path, capsys):
    pytest.importorskip("torch_geometric")
    auto_proteins = importlib.import_module("auto_proteins")
    argv = ["--set", "epochs=2", "--device", "cpu", "--out"]
    main = harness("command").main
    main(auto_proteins.EXPERIMENT, [*argv, str(tmp_path / "whole")])
    main(auto_proteins.EXPERIMENT, [*argv, str(tmp_path / "parts"), "--minutes", "0"])
    assert "the same command goes on from here" in capsys.readouterr().out
    main(auto_proteins.EXPERIMENT, [*argv, str(tmp_path / "parts")])

    def measured(folder):
        found = {}
        for path in (tmp_path / folder).rglob("record.json"):
            record = json.loads(path.read_text())
            rows = [row for row in record["history"] if row["step"] <= 8]
            timeless = [
                {k: v for k, v in r.items() if not k.endswith(("onds", "_step"))} for r in rows
            ]
            found[record["name"]] = timeless, [c for c in record["choices"] if c["step"] < 8]
        return found

    assert measured("whole") == measured("parts")
    assert len({c["equilibrium"] for c in measured("whole")["auto-0.95"][1]}) == 3
    picture = tmp_path / "whole" / "smoke" / "choices.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bars_join_what_is_the_same(harness):
    record = harness("training").Record("auto", 1, {}, 9, steps=9)
    chosen = [(0, "jfb"), (2, "jfb"), (4, "ift"), (6, "jfb")]
    record.choices = [{"equilibrium": "f", "step": step, "spec": spec} for step, spec in chosen]
    record.choices.append({"equilibrium": "g", "step": 0, "spec": "ift"})
    bars = harness("choices")._bars(record)
    assert bars == [
        ("auto 1 f", [(0, 4, "jfb"), (4, 6, "ift"), (6, 9, "jfb")]),
        ("auto 1 g", [(0, 9, "ift")]),
    ]
    assert harness("choices").plot([harness("training").Record("a", 0, {}, 1)], "") is None


# --- reports along training, and what they predict ------------------------------------------------


def test_finished_runs_of_an_earlier_command_stand_beside_these(tmp_path, harness):
    """Of the same settings; one that is newer than the file had its default there."""
    command, results = harness("command"), harness("results")
    auto_digits = importlib.import_module("auto_digits")
    kind = auto_digits.EXPERIMENT.settings
    plan = harness("plan").load_plan(FOLDER / "auto_digits.yaml", "smoke", kind, {}, ["ift"], [1])
    settings = command._plain(plan.runs["ift"])
    del settings["report_every"]

    def runs_of(**changed):
        earlier = [
            {"name": "ift", "repeat": 0, "settings": settings | changed, "total": 4, "steps": 4},
            {"name": "ift", "repeat": 2, "settings": settings | changed, "total": 4, "steps": 2},
        ]
        file = tmp_path / "results.json"
        file.write_text(json.dumps({"environment": {"date": "1999-12-31"}, "runs": earlier}))
        experiment = auto_digits.EXPERIMENT
        return command.Runs(experiment, plan, None, CPU, tmp_path / "out", [file])

    now = [harness("training").Record("ift", 1, settings, 4, 4)]
    found = runs_of().beside(now)
    assert [(r.repeat, r.environment) for r in found] == [(0, {"date": "1999-12-31"}), (1, {})]
    with pytest.raises(SystemExit, match=r"lr was 0\.5 and is"):
        runs_of(lr=0.5).beside(now)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"expected a results\.json"):
        results.finished_records(tmp_path / "results.json")


def test_a_picture_of_what_reports_predict(tmp_path, capsys):
    predicts = load_example("report_predicts")
    levels = {"a": 0.9, "b": 0.8, "c": 0.7}
    runs = [
        {
            "name": name,
            "history": [
                {"step": step, "report_rho": 0.1 * step, "cosine": level - step / 100}
                | ({"accuracy": level / 2 + repeat / 100} if step else {})
                for step in (0, 1, 5, 10)
            ],
            "steps": 10 if name != "unfinished" else 4,
            "total": 10,
            "error": None,
        }
        for name, level in {**levels, "unfinished": 0.1}.items()
        for repeat in (0, 1)
    ]
    del runs[0]["history"][0]["cosine"]  # where the exact gradient is not known
    for run in runs:
        if run["name"] == "c":  # goes on in a race; what it reaches then does not count
            run["history"].append({"step": 20, "report_rho": 9.0, "cosine": 0.0, "accuracy": 0.99})
            run["steps"] = run["total"] = 20
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"runs": runs}))
    predicts.main([f"task={file}", "--out", str(tmp_path / "out")])
    with open(tmp_path / "out" / "report_predicts.csv") as lines:
        header, *rows = csv.reader(lines)
    assert header[:4] == ["task", "method", "cosine, start", "cosine, tenth"]
    best, _, worst, ranks = rows
    assert best == ["task", "a", "0.900", "0.890", "0.800", "0.000", "0.100", "1.000", "0.455", "2"]
    assert worst[1:3] == ["c", "0.700"]
    assert ranks[1:5] == ["rank correlation", "1.00", "1.00", "1.00"]
    assert (tmp_path / "out/report_predicts.png").read_bytes().startswith(b"\x89PNG")
    assert "rank correlation" in capsys.readouterr().out
    for argument, said in ((str(file), "expected NAME=FILE"), ("x=nowhere", "nowhere")):
        with pytest.raises(SystemExit, match=said):
            predicts.main([argument])
    file.write_text(json.dumps({"runs": []}))
    with pytest.raises(SystemExit, match="no finished run has reports"):
        predicts.main([f"task={file}"])
    for content in ([1], {}, {"runs": 3}):
        file.write_text(json.dumps(content))
        with pytest.raises(SystemExit, match=r"expected a results\.json, or"):
            predicts.main([f"task={file}"])
    row = {"step": 0, "report_rho": 1.0, "accuracy": 0.5}
    run = {"name": "a", "steps": 4, "total": 4, "error": None, "history": [row]}
    for broken, said in (
        ({"steps": 4}, "a run has no 'history'"),
        (run | {"history": [row | {"step": 9}]}, "no accuracy at or before step 4"),
    ):
        file.write_text(json.dumps({"runs": [broken]}))
        with pytest.raises(SystemExit, match=said):
            predicts.main([f"task={file}"])
    file.write_text(json.dumps({"runs": [run]}))
    with pytest.raises(SystemExit, match="another NAME for each FILE"):
        predicts.main([f"task={file}", f"task={file}"])
    found = predicts.points("task", {"runs": [run | {"history": [row | {"accuracy": None}]}]})
    assert found[0].level == -math.inf  # JSON has no NaN: it has diverged


def test_a_recursive_model_has_a_panel_per_kind_of_cosine(tmp_path):
    predicts = load_example("report_predicts")
    run = {"name": "a", "steps": 2, "total": 2, "error": None}
    row = {"report_rho": 0.9, "report_cosine": 0.3, "solved": 0.5}
    run["history"] = [{"step": 0} | row, {"step": 2, "cosine": 0.8} | row]
    exact, with_loop = predicts.points("Sudoku", {"runs": [run]})
    assert (exact.task, exact.level, exact.key) == ("Sudoku", 0.5, "solved")
    assert exact.cosines[::2] == (0.3, 0.3)
    assert math.isnan(exact.cosines[1])  # no report is near a tenth
    assert with_loop.task == "Sudoku, with backpropagation"
    assert math.isnan(with_loop.cosines[0])  # there is no batch before the first step
    assert with_loop.cosines[2] == 0.8
    assert exact.higher
    assert with_loop.higher


def test_looped_language_models_are_compared_at_the_loops_of_training():
    predicts = load_example("report_predicts")
    history = [
        {"step": 0, "cosine": 0.9, "report_rho": 1.0},
        {"step": 5, "perplexity": {"4": 7.0, "8": 6.0}, "cosine": 0.8, "report_rho": 2.0},
    ]
    run = {"method": "npg", "seed": 0, "steps": 5, "history": history, "error": None}
    content = {"costs": {}, "settings": {"loops": "8", "steps": 5}, "runs": [run]}
    (found,) = predicts.points("looped", content)
    assert (found.method, found.level, found.higher) == ("npg", 6.0, False)
    assert (found.cosines[::2], found.radii[::2]) == ((0.9, 0.8), (1.0, 2.0))
    assert math.isnan(found.cosines[1])
    history[1]["perplexity"]["8"] = None  # JSON has no infinity
    assert predicts.points("looped", content)[0].level == math.inf
    content["settings"]["loops"] = "poisson(8)"
    with pytest.raises(ValueError, match=r"poisson\(8\) is none of --test-loops 4, 8"):
        predicts.points("looped", content)


def test_rank_correlation_is_that_of_scipy():
    from scipy.stats import spearmanr

    predicts = load_example("report_predicts")
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        x, y = torch.randint(5, (2, 7), generator=generator).tolist()
        found = [
            predicts.Point("", "", float(level), "perplexity", (float(c),) * 3, (0.0,) * 3, 1)
            for c, level in zip(x, y, strict=True)
        ]
        wanted = spearmanr(x, [-v for v in y]).statistic
        assert predicts.correlation(found, 0) == pytest.approx(wanted, nan_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "own"),
    [("auto_text", "npg"), ("auto_proteins", "npg(lam=0.8)")],
)
def test_reports_along_training(name, own, harness):
    """IGNN's setting has another lam for methods that leave it out."""
    experiment = importlib.import_module(name).EXPERIMENT
    changes = {"report_grads": ["jfb", own], "report_every": 1000}
    plan = harness("plan").load_plan(
        FOLDER / f"{name}.yaml", "smoke", experiment.settings, changes, ["npg"], [0]
    )
    task = experiment.task(plan.runs["npg"], 0, None, CPU)
    found = task.evaluate(0)
    assert found["cosine"] == found[f"cosine of {own}"]
    assert -1 <= found["cosine of jfb"] <= found["cosine"] <= 1
    assert found["report_rho"] > 0
    assert "cosine" not in task.evaluate(1)
