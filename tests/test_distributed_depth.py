"""Two processes draw the same depths, unless told otherwise, and DDP reduces either: on gloo."""

from __future__ import annotations

import sys

import pytest

import deq_phantom_plugin as dpp
import processes
from conftest import DRIVERS

DRIVER = DRIVERS / "depths.py"
sys.path.append(str(DRIVER.parent))

from depths import CALLS, CASES, STEPS, Net, data, numbers_of  # noqa: E402

pytestmark = [
    processes.needs_gloo,
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("depths") / "found.json"
    return processes.found(DRIVER, out)


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_the_mean_of_what_each_process_has_drawn(found, case):
    assert found[case]["error"] < 1e-12


@pytest.mark.parametrize("case", CASES)
def test_who_draws_with_whom(found, case):
    drawn = found[case]["drawn"]
    apart = "per_process" in case or case == "both"
    assert any(first != second for first, second in drawn) == apart
    for rank in range(2):
        # Of each loop its calls in all steps; a step's draws differ from another's, a loop's too.
        calls = [[step[rank][loop::2] for step in drawn] for loop in range(2)]
        assert all(len(of_step) == CALLS for of_loop in calls for of_step in of_loop)
        alike = all(a == b for of_loop in calls for a, b in of_loop)
        assert alike == (case not in ("per_call", "both"))
        assert calls[0] != calls[1]
        assert len({str(of_step) for of_step in calls[0]}) > STEPS // 2


@pytest.mark.parametrize("case", CASES)
def test_the_first_process_draws_as_one_alone(found, case):
    model = Net(*CASES[case])
    for step, (first, _) in enumerate(found[case]["drawn"]):
        dpp.set_step(model, step)
        model.seen.clear()
        model(data(step, 0))
        assert numbers_of(model) == [tuple(each) for each in first]
