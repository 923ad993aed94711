"""The long run of `make soak`: its verdicts see what grows, and a short one finds nothing."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch

from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

from soak import Sample, slope, verdicts

STEPS = range(500, 20_001, 500)


def judged(**grows):
    """Verdicts on a run in which numbers grow so much a step, and memory and time are noisy."""
    noise, samples = random.Random(0), []
    for step in STEPS:
        at = {name: rate * step for name, rate in grows.items()}
        samples.append(
            Sample(
                step,
                memory=int(3e8 + 1e5 * noise.random() + at.get("memory", 0)),
                tensors=int(76 + noise.choice([0, 0, 13]) + at.get("tensors", 0)),
                handles=int(11 + at.get("handles", 0)),
                threads=int(4 + at.get("threads", 0)),
                milliseconds=10 + noise.random() + at.get("milliseconds", 0),
            )
        )
    return {verdict.name: verdict.flat for verdict in verdicts(samples)}


def test_noise_is_flat():
    assert set(judged().values()) == {True}


@pytest.mark.parametrize(
    ("name", "a_step"),
    [
        ("memory", 500),  # the least that a tensor takes
        ("tensors", 0.01),
        ("handles", 1 / 500),  # one for each checkpoint
        ("threads", 1 / 5000),
        ("milliseconds", 1e-3),
    ],
)
def test_what_grows_is_seen_and_nothing_else(name, a_step):
    flat = judged(**{name: a_step})
    assert [other for other, is_flat in flat.items() if not is_flat] == [name]


def test_single_outliers_are_no_growth():
    assert slope([0, 1, 2, 3, 4, 5], [1, 1, 1, 1, 1, 100]) == 0
    assert slope([0, 1, 2, 3], [0, 2, 4, 6]) == 2


@pytest.mark.slow
@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this PyTorch has no gloo",
)
@pytest.mark.skipif(sys.platform != "linux", reason="no /proc here")
def test_a_short_run_is_flat(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(ROOT / "benchmarks" / "soak.py")]
    ended = subprocess.run(
        [*command, "--steps", "600", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    rows = [line.split() for line in ended.stdout.splitlines() if line.startswith(("0 ", "1 "))]
    assert len(rows) == 10, ended.stderr[-3000:]
    # How long a step takes in so short a run depends on what else the machine does.
    assert all(row[-1] == "flat" for row in rows if row[1] != "milliseconds"), ended.stdout
    assert len([line for line in ended.stdout.splitlines() if line.startswith("step ")]) == 40
    assert len(list((tmp_path / "checkpoints").glob("step_*"))) == 3
