"""Two processes choose alike, on numbers of both: DDP and FSDP2, on gloo."""

from __future__ import annotations

import sys

import pytest

import deq_phantom_plugin as dpp
import processes
from conftest import DRIVERS

DRIVER = DRIVERS / "choices.py"
sys.path.append(str(DRIVER.parent))

from choices import CASES, EVERY, ROWS, Net, choices_of, data  # noqa: E402

pytestmark = processes.needs_gloo


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("choices") / "found.json"
    return processes.found(DRIVER, out)


@pytest.fixture(scope="module")
def alone():
    """What each process would choose at the first step by itself."""
    chosen = []
    for rank in range(2):
        model = Net()
        dpp.set_step(model, 0)
        model(data(0, rank)).square().mean().backward()
        chosen += choices_of(model)
    return chosen


@pytest.mark.parametrize("case", CASES)
def test_all_processes_choose_alike(found, case):
    first, second = found[case]
    assert first
    assert first == second


def test_alone_they_would_not(alone):
    assert alone[0][1] != alone[1][1]


@pytest.mark.filterwarnings("ignore:auto.* no method has a cosine")
def test_the_cosine_is_the_mean_of_the_processes_weighted_by_their_samples(found):
    """Of `jfb`, which every process can take by itself."""
    grad, qualities = "auto(methods=['jfb'])", []
    for rank in range(2):
        model = Net(grad)
        dpp.set_step(model, 0)
        model(data(0, rank)).square().mean().backward()
        qualities.append(choices_of(model)[0][2])
    want = sum(n * q for n, q in zip(ROWS, qualities, strict=True)) / sum(ROWS)
    judged = {spec: cosine for _, spec, cosine, _ in found["jfb"][0]}
    assert judged["jfb()"] == pytest.approx(want, abs=1e-9)


def test_where_one_process_overflows_all_measure_at_the_next_step(found):
    assert found["overflow"][0][0][0] == 1
    assert found["plain"][0][0][0] == 0


def test_a_process_without_samples_that_count_leaves_it_to_the_others(found, alone):
    assert found["no samples"][0][0][1:] == list(alone[0][1:])


def test_a_resumed_run_goes_on_in_all_processes(found):
    assert found["resumed"] == found["plain"]
    assert found["plain"][0][-1][0] == 2 * EVERY
