"""Lockstep where processes do different things in a step, or do a part of it again."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
import torch.distributed
from test_distributed_lockstep import assert_one

import deq_phantom_plugin._plumbing.exchange as exchange
import processes
from conftest import DRIVERS
from deq_phantom_plugin._plumbing.communication import Communication
from deq_phantom_plugin._plumbing.compilation import eager

DRIVER = DRIVERS / "lockstep_unequal.py"
sys.path.append(str(DRIVER.parent))

from lockstep_unequal import EMPTY, LOOPS, METHODS, REPEATED, cases  # noqa: E402

pytestmark = processes.needs_gloo
IN_FOUR = "sequence and data"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return processes.found(DRIVER, tmp_path_factory.mktemp("unequal") / "two.json")


@pytest.mark.parametrize("grad", REPEATED)
@pytest.mark.parametrize("how", ["reentrant", "repeated"])
def test_a_forward_pass_that_is_repeated_in_backward(found, how, grad):
    """By both kinds of checkpoint; products in it must not lose gradients of sharded weights."""
    assert_one(found[f"{how} | {grad}"])


@pytest.mark.parametrize("grad", LOOPS)
@pytest.mark.parametrize("state", ["loop", "split loop"])
def test_loops(found, state, grad):
    """Of an F that is sharded apart, and of a state that is split."""
    assert_one(found[f"{state} | {grad}"])


@pytest.mark.parametrize("outside", ["auto", "ift(tol=1e-10)", "upg"])
def test_a_solve_inside_of_f(found, outside):
    assert_one(found[f"nested | {outside}"])


@pytest.mark.parametrize("name", ["accumulated", "adaptive", "kept", "offloaded"])
def test_ways_of_fsdp2(found, name):
    assert_one(found[name])


def test_an_error_that_all_processes_catch_leaves_nothing_behind(found):
    from torch.distributed.fsdp import FSDPModule

    if not hasattr(FSDPModule, "reset_iter_state"):
        pytest.skip("FSDP2 of this PyTorch does not go on after an error")
    assert_one(found["caught"])


def test_weights_that_are_sharded_over_one_process(tmp_path):
    """Products in the middle of its forward pass leave them there."""
    found = processes.found(DRIVER, tmp_path / "one.json", "adaptive", processes=1)
    assert_one(found["adaptive"])


@pytest.mark.parametrize("grad", ["jfb", "upg"])
def test_who_stands_in_leaves_no_weight_without_a_graph_in_a_cache(found, grad):
    """Or its own evaluation with autograd would use that weight, which then gets no gradient."""
    assert_one(found[f"cached | {grad}"])


@pytest.mark.parametrize("name", ["split loop | batch", "three states", "all states"])
def test_states(found, name):
    assert_one(found[name])


def test_states_that_some_processes_leave_out_are_refused(found):
    """A backward pass for each would be waited for until a timeout."""
    assert found["states left out"].startswith("RuntimeError: F communicates, and the solve of a")


@pytest.mark.parametrize("grad", EMPTY)
def test_a_process_without_samples_stands_in_for_those_that_ask_whether_theirs_couple(found, grad):
    assert_one(found[f"without samples | {grad}"])


@pytest.mark.parametrize("what", ["samples", "gradient"])
def test_a_process_with_nothing_to_measure_takes_part(found, what):
    case = found[f"methods without {what}"]
    assert_one(case)
    assert case["chosen"][0] == case["chosen"][1] != [], METHODS


def test_told_that_f_does_not_communicate_nothing_is_looked_at(found):
    assert found["looked"] == {"None": 0, "auto": 4}


def test_all_cases_of_the_driver_are_looked_at(found):
    assert set(found) == set(cases()) - {IN_FOUR}


@pytest.mark.slow
def test_a_split_state_beside_weights_that_are_split_over_other_processes(tmp_path):
    """Sequence parallel within data parallel: neither group alone is enough."""
    case = processes.found(DRIVER, tmp_path / "four.json", IN_FOUR, processes=4)[IN_FOUR]
    assert_one(case)
    assert len(set(case["needed"])) > 1


def test_compiled_modules_are_looked_at_without_a_warning():
    module = torch.compile(torch.nn.Linear(2, 2), backend="eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Using `torch.compile")
        with Communication() as seen, eager():  # as a solve looks at them
            module(torch.zeros(1, 2))
    assert seen.ranks == ()


def test_who_has_not_come_to_a_solve_is_told_how_to_be_left_out(monkeypatch):
    def nobody(ranks):
        raise RuntimeError("wait timeout")

    monkeypatch.setattr(exchange, "Hosts", nobody)
    monkeypatch.setattr(exchange, "_known", {})
    with pytest.raises(RuntimeError, match=r"processes \(0, 1\) .*process_group=\.\.\."):
        exchange.hosts_of((0, 1))
