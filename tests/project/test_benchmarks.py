"""The benchmark suite: it runs, counts right, and its ratios are those of the times it took."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

from suite.accounting import Counted, profiled, saved_bytes
from suite.contest import (
    Contender,
    Contest,
    Ratio,
    Settings,
    Unavailable,
    hold,
)
from suite.report import Results
from suite.timing import Spread, interleave, paired_ratio


class Clock:
    """Takes the times it is told to, and remembers who asked."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.calls = []

    def __call__(self, run):
        name = run()
        self.calls.append(name)
        slow = 10 if len(self.calls) > 3 else 1  # the second round falls into a slow minute
        return self.seconds[name] * slow


def test_contenders_take_turns():
    clock = Clock({"a": 1.0, "b": 2.0, "c": 4.0})
    seconds = interleave({name: lambda name=name: name for name in "abc"}, 3, clock)
    assert [sorted(clock.calls[i : i + 3]) for i in (0, 3, 6)] == [["a", "b", "c"]] * 3
    assert [clock.calls[i] for i in (0, 3, 6)] == ["a", "b", "c"]
    assert seconds == {"a": [1, 10, 10], "b": [2, 20, 20], "c": [4, 40, 40]}


def test_ratio_is_of_times_from_the_same_round():
    clock = Clock({"a": 1.0, "b": 2.0, "c": 4.0})
    seconds = interleave({name: lambda name=name: name for name in "abc"}, 4, clock)
    ratio = paired_ratio(seconds["b"], seconds["c"])
    assert ratio == Spread(0.5, 0.5, 0.5)


def test_spread():
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0)


def test_evaluations_and_products_are_counted():
    weight = torch.tensor(0.5, requires_grad=True)
    func = Counted(lambda h: [weight * h[0], weight * h[1]])
    state = [torch.ones(2), torch.ones(3)]
    func(state)
    assert func.evaluations == 0, "only on demand"
    with func.count():
        with torch.no_grad():
            func(state)
        inputs = [h.clone().requires_grad_() for h in state]
        outputs = func(inputs)
        for _ in range(3):
            torch.autograd.grad(outputs, inputs, state, retain_graph=True)
        (outputs[0].sum() + outputs[1].sum()).backward()
    assert (func.evaluations, func.backwards) == (2, 4)


def test_saved_bytes_are_those_held_at_once():
    weight = torch.ones(100, requires_grad=True)

    def graphs(n):
        h = torch.ones(100)
        for _ in range(n):
            h = (h * weight).exp()  # saves h and its result; the next h is this result
        h.sum().backward()

    size = 100 * 4
    assert saved_bytes(lambda: graphs(1), [weight]) == 2 * size
    assert saved_bytes(lambda: graphs(5), [weight]) == 6 * size
    assert saved_bytes(lambda: [graphs(1) for _ in range(5)], [weight]) == 2 * size
    assert saved_bytes(lambda: graphs(5), []) == 7 * size, "weights count unless known"


def test_numbers_read_by_the_host_are_counted():
    numbers = torch.arange(5.0)
    counts = profiled(lambda: [float(x) for x in numbers], torch.device("cpu"))
    assert counts["host_reads"] == 5


def test_what_cannot_run_says_why(tmp_path):
    def absent():
        raise Unavailable("it is not installed")

    def broken():
        raise RuntimeError("no such kernel\nand more")

    contest = Contest(
        "group",
        "work",
        [
            Contender("a", "ours", lambda: lambda: None),
            Contender("b", "peer", absent),
            Contender("c", "peer", broken),
        ],
        [Ratio("a", "a", 1.0), Ratio("a", "b"), Ratio(["a"], ["b", "c"])],
    )
    results = Results({})
    hold(contest, Settings(repeats=2), results)
    assert [row.missing for row in results.rows] == [
        "",
        "it is not installed",
        "RuntimeError: no such kernel",
    ]
    assert not results.rows[1].numbers
    assert results.ratios[0].median == 1.0
    assert results.ratios[0].verdict == "met"
    assert results.ratios[1].missing == "b: it is not installed"
    assert results.ratios[1].verdict == ""
    results.write(tmp_path / "deep" / "results.json")
    assert "not available: it is not installed" in (tmp_path / "deep" / "results.md").read_text()


def bench(tmp_path, *arguments, command=(sys.executable, str(ROOT / "benchmarks" / "bench.py"))):
    """Run the suite on tiny sizes and return what it wrote."""
    out = tmp_path / "out.json"
    done = subprocess.run(
        [*command, "--quick", "--threads=1", f"--out={out}", f"--cache={tmp_path}", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert out.with_suffix(".md").read_text() == done.stdout.removesuffix("\n")
    return json.loads(out.read_text())


def check(results, groups):
    """Every row has finite numbers or says why not; ours all ran."""
    assert {row["group"] for row in results["rows"]} == set(groups)
    for row in results["rows"]:
        if row["missing"]:
            assert not row["numbers"], row
            assert row["peer"] != "ours" or "residual" in row["missing"], row
        else:
            assert row["numbers"]["ms"] > 0, row
            assert all(math.isfinite(number) for number in row["numbers"].values()), row
    for ratio in results["ratios"]:
        assert ratio["missing"] or ratio["low"] <= ratio["median"] <= ratio["high"], ratio


def test_runs_end_to_end(tmp_path):
    pytest.importorskip("torchdeq")
    groups = ["backward", "overhead", "synthetic"]
    results = bench(tmp_path, "--only", *groups)
    check(results, groups)
    assert results["environment"]["torch"] == torch.__version__
    by_method = {r["method"]: r["numbers"] for r in results["rows"] if r["group"] == "backward"}
    assert by_method["upg(k=5, lam=0.5) attach"]["f"] == 5
    assert by_method["npg(k=5, lam=0.5) attach"]["f"] == 1
    assert by_method["npg(k=5, lam=0.5) attach"]["VJPs"] == 5


@pytest.mark.slow
def test_other_groups_run_end_to_end(tmp_path):
    pytest.importorskip("torchdeq")
    groups = ["forward", "step", "ift", "memory", "scaling", "device", "compiled"]
    results = bench(tmp_path, "--only", *groups)
    check(results, groups)
    graphs = [r["numbers"] for r in results["rows"] if r["group"] == "compiled"]
    assert [numbers["graphs"] > 0 for numbers in graphs] == [False, True]
    assert {numbers["graphs later"] for numbers in graphs} == {0}
    forward = [r["numbers"] for r in results["rows"] if r["group"] == "forward" and r["numbers"]]
    assert {numbers["f"] for numbers in forward} == {22}


@pytest.mark.slow
def test_gpu_script_runs_where_only_torch_is(tmp_path):
    """Without site-packages of ours: the package comes from the checkout, its entry points too."""
    script = ROOT / "benchmarks" / "gpu.sh"
    os.environ.setdefault("PYTHON", sys.executable)
    groups = ["synthetic", "overhead"]
    check(bench(tmp_path, "--device", "cpu", "--only", *groups, command=("bash", script)), groups)


# In a Python that sees nothing of an installation: -S leaves out site-packages.
FROM_THE_CHECKOUT = """
import importlib.metadata as metadata
import pathlib

found = {p.name: p.module for p in metadata.entry_points(group="deq_phantom_plugin.hosts")}
assert found["torchdeq"] == "deq_phantom_plugin.hosts.torchdeq", found
package = metadata.distribution("deq-phantom-plugin").locate_file("deq_phantom_plugin")
assert (pathlib.Path(package) / "adapters" / "mdeq" / "__init__.py").is_file()
"""


def test_importable_from_the_checkout(tmp_path):
    lay_out = [sys.executable, str(ROOT / "benchmarks" / "importable.py"), str(tmp_path / "here")]
    folder = subprocess.run(lay_out, capture_output=True, text=True, check=True).stdout.strip()
    subprocess.run(
        [sys.executable, "-S", "-c", FROM_THE_CHECKOUT],
        env={**os.environ, "PYTHONPATH": folder},
        cwd=tmp_path,
        check=True,
    )
