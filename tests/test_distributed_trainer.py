"""Transformers' Trainer and Accelerate: two processes train as one does on the joint batch."""

from __future__ import annotations

import sys

import pytest
import torch

import processes
from conftest import DRIVERS

pytest.importorskip("torchdeq")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

DRIVER = DRIVERS / "trainer.py"
sys.path.append(str(DRIVER.parent))

from trainer import RUNNERS, SPECS  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    processes.needs_gloo,
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By number of processes and case: the parameters after 0, 1 and 10 steps."""
    folder = tmp_path_factory.mktemp("trainer")
    states = {}
    for count in (1, 2):
        out = folder / f"{count}.pt"
        ended = processes.run(DRIVER, out, processes=None if count == 1 else count)
        assert ended.returncode == 0, ended.stderr[-3000:]
        states[count] = torch.load(out)
    return states


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("runner", RUNNERS)
def test_two_processes_train_as_one_on_the_joint_batch(found, runner, spec, accumulate):
    start, *ours = found[2][runner, spec, accumulate]
    same_start, *joint = found[1][runner, spec, 1]
    for name, begin in start.items():
        assert torch.equal(begin, same_start[name])
        for got, want in zip(ours, joint, strict=True):
            # Of the way from the start: after the first step that is the gradient itself.
            way = (want[name] - begin).norm()
            assert way > 0
            assert (got[name] - want[name]).norm() <= 1e-6 * way


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("runner", RUNNERS)
def test_the_schedule_is_told_the_step(found, runner, processes):
    schedule = next(spec for spec in SPECS if spec.startswith("schedule"))
    _, *scheduled = found[processes][runner, schedule, 1]
    _, *jfb = found[processes][runner, "jfb", 1]
    pairs = zip(scheduled, jfb, strict=True)
    differ = [any(not torch.equal(a[name], b[name]) for name in a) for a, b in pairs]
    assert differ == [False, True]  # the same stage in the first step, another at the end
