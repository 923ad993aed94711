"""Processes whose F communicates solve in lockstep: FSDP2 with F sharded apart, and others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch
import torch.distributed

import processes
from conftest import DRIVERS

DRIVER = DRIVERS / "lockstep_cases.py"
sys.path.append(str(DRIVER.parent))

from lockstep_cases import HOSTED, SOLVERS, SPECS, SPLIT, Net, cases  # noqa: E402

from deq_phantom_plugin._plumbing.communication import Communication  # noqa: E402
from deq_phantom_plugin._plumbing.lockstep import NOTICE  # noqa: E402

pytestmark = processes.needs_gloo
FOUR = [
    "ift(tol=1e-10) | fixed_point",
    "npg_rr | fixed_point",
    "upg(lam='adaptive') | fixed_point",
    "shine | broyden",
    "tensor parallel",
    "split | ift(tol=1e-10)",
    "split | npg_rr",
    "fails in the solve",
]
COMPARED = [
    *(f"{spec} | fixed_point" for spec in SPECS),
    *(f"{spec} | {solver}" for spec in ("upg", "ift(tol=1e-10)") for solver in SOLVERS),
    "shine | broyden",
    "checkpointed",
    *(f"sliced | {solver}" for solver in HOSTED),
    *(f"indexing | {solver}" for solver in HOSTED[1::2]),
    *(f"split | {spec}" for spec in SPLIT),
    *(f"split | {name}" for name in ("anderson", "broyden", "shine", "batch", "nested")),
    "F alone",
    "no_grad",
    "inference_mode",
    "without samples",
    "without gradient",
    "without solve",
    "tensor parallel",
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return processes.found(DRIVER, tmp_path_factory.mktemp("lockstep") / "two.json")


@pytest.fixture(scope="module")
def of_four(tmp_path_factory):
    return processes.found(
        DRIVER, tmp_path_factory.mktemp("lockstep") / "four.json", *FOUR, processes=4
    )


def assert_one(case):
    """What several processes computed is what one does, and all evaluated F equally often."""
    assert isinstance(case, dict), case
    assert case["error"] <= 1e-6
    assert len(set(case["calls"])) == 1


@pytest.mark.parametrize("name", COMPARED)
def test_two_processes_are_one(found, name):
    assert_one(found[name])


def test_all_cases_of_the_driver_are_looked_at(found):
    others = {
        "alike",
        "shorter at last",
        "split | refused",
        "told",
        "not finite",
        "auto",
        "spectral_radius",
        "apart",
    }
    fails = {name for name in found if name.startswith("fails")}
    assert set(found) == {*COMPARED, *others, *fails} == set(cases())


@pytest.mark.parametrize("solver", SOLVERS)
def test_alone_they_would_evaluate_f_unequally_often(found, solver):
    """Or nothing above would show anything."""
    few, many = found[f"ift(tol=1e-10) | {solver}"]["needed"]
    assert 1.5 * few < many


def test_where_f_does_not_communicate_they_do(found):
    few, many = found["apart"]["calls"]
    assert few < many


def test_they_agree_once_on_what_is_always_the_same(found):
    """On all evaluations of a solve, on its graph and its products; and at the end of each part."""
    case = found["alike"]
    assert_one(case)
    assert case["calls"][0] == case["needed"] > 20
    assert case["exchanges"] <= 8


def test_a_solve_that_is_shorter_for_once_is_right(found):
    case = found["shorter at last"]
    assert_one(case)
    assert case["calls"][0] > case["needed"]  # or nothing was agreed on


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FOUR if not name.startswith("fails")])
def test_four_processes_are_one(of_four, name):
    assert_one(of_four[name])


def test_a_group_that_was_told_is_one_that_nobody_could_see(found):
    assert len(set(found["told"]["calls"])) == 1


def test_where_one_process_meets_a_nan_all_fall_back(found):
    case = found["not finite"]
    assert case["finite"]
    assert case["failures"][0] == 0 < case["failures"][1]
    assert len(set(case["calls"])) == 1


def test_second_derivatives_of_a_split_state_are_refused(found):
    """What F captures is found among ordinary tensors."""
    assert found["split | refused"].startswith("RuntimeError: func uses other tensors in backward")


def test_auto_measures_and_chooses_alike(found):
    case = found["auto"]
    assert case["chosen"][0] == case["chosen"][1] != []
    assert len(set(case["calls"])) == 1


def test_spectral_radius(found):
    assert found["spectral_radius"]["error"] <= 1e-6


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        ("fails in the solve", 1),
        ("fails in what was agreed", 1),
        ("fails at first", 1),
        ("fails in strategy", 0),
        ("fails where it stands in", 0),
    ],
)
def test_an_exception_in_one_process_ends_all(found, name, rank):
    assert_ended(found[name], rank)


@pytest.mark.slow
def test_an_exception_in_one_of_four_ends_all(of_four):
    assert_ended(of_four["fails in the solve"], 1)


def assert_ended(case, rank):
    for other, said in enumerate(case["said"]):
        if other == rank:
            assert said == "ArithmeticError: F has failed"
        else:
            assert said.startswith(f"RuntimeError: process {rank} has raised an exception")
    assert max(case["seconds"]) < NOTICE


def ended(tmp_path, how):
    """What two processes return, and what they say, of which one ends in a solve."""
    port = torch.distributed.TCPStore("localhost", 0, is_master=True).port + 1
    running = []
    for rank in range(2):
        world = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        running.append(
            subprocess.Popen(
                [sys.executable, str(DRIVER), str(tmp_path / "none"), how],
                env={**os.environ, **{name: str(value) for name, value in world.items()}},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [process.communicate(timeout=300)[1] for process in running]
    return [process.returncode for process in running], said


def test_who_is_within_a_collective_of_f_ends_with_the_process_that_has_failed(tmp_path):
    returned, said = ended(tmp_path, "raises")
    assert returned == [1, 1], said
    assert "ArithmeticError: F has failed before it communicates" in said[1]
    # And not with the timeout of the group.
    assert "RuntimeError" in said[0]
    assert "onnection" in said[0]
    assert "imed out" not in said[0]


def test_who_fails_between_two_collectives_of_f_begins_no_other(tmp_path):
    """The others would take it for the next one, and gloo would abort one of the processes."""
    returned, said = ended(tmp_path, "raises within")
    assert returned == [1, 1], said
    assert "ArithmeticError: F has failed" in said[1]
    assert "terminate called" not in "".join(said)


def test_a_process_that_is_killed_ends_the_others(tmp_path):
    returned, said = ended(tmp_path, "is killed")
    assert returned == [1, -signal.SIGKILL], said
    assert "RuntimeError: a process of (0, 1) has ended, or has not come" in said[0]
    assert "imed out" not in said[0]


def test_batch_normalisation_over_processes_communicates(monkeypatch):
    """On a CPU it does not, but it is seen all the same."""
    monkeypatch.setattr(torch.distributed, "get_process_group_ranks", lambda group: [0, 1])
    layer = torch.nn.SyncBatchNorm(3)
    for training, ranks in ((True, (0, 1)), (False, ())):
        with Communication() as seen:
            layer.train(training)(torch.zeros(2, 3))
        assert seen.ranks == ranks


@pytest.mark.parametrize("group", ["all", 0, object()])
def test_what_is_no_group_is_refused(group):
    with pytest.raises(ValueError, match=r"process_group=.*expected a group of torch.distributed"):
        Net(process_group=group)
