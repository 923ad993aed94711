"""Lightning in two processes trains as a loop in one does on the joint batch: on gloo."""

from __future__ import annotations

import sys

import pytest

import processes
from conftest import DRIVERS

pytest.importorskip("lightning")

DRIVER = DRIVERS / "lightning_trainer.py"
sys.path.append(str(DRIVER.parent))

from lightning_trainer import SPECS, STEPS  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    processes.needs_gloo,
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each process found, by case."""
    out = tmp_path_factory.mktemp("lightning") / "found.json"
    return processes.found(DRIVER, out)


def assert_same(found, case, accumulate=1):
    for process in found:
        assert process[case]["apart"] <= 1e-6
        told = [[step, STEPS] for step in range(STEPS) for _ in range(accumulate)]
        assert process[case]["told"] == told


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("grad", SPECS)
def test_data_parallel(found, grad, accumulate):
    assert_same(found, f"ddp | {grad} | {accumulate}", accumulate)


@pytest.mark.parametrize("how", ["sharded", "F apart"])
@pytest.mark.parametrize("grad", SPECS)
def test_sharded_as_a_whole_and_with_f_apart(found, grad, how):
    assert_same(found, f"{how} | {grad}")
    assert all(process[f"{how} | {grad}"]["sharded"] for process in found)


@pytest.mark.parametrize("how", ["resumed", "resumed, sharded"])
@pytest.mark.parametrize("grad", SPECS)
def test_resumed(found, grad, how):
    assert_same(found, f"{how} | {grad}")


def test_the_first_process_logs(found):
    first, _ = found
    assert first["monitored"]["logged"] == [0, 2, 4]
    assert all(process["monitored"]["apart"] <= 1e-6 for process in found)
