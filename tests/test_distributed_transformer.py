"""The language model under FSDP2, as Accelerate shards it; processes solve unequally often."""

from __future__ import annotations

import sys

import pytest

import processes
from conftest import DRIVERS

pytest.importorskip("torchdeq")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

DRIVER = DRIVERS / "sharded_transformer.py"
sys.path.append(str(DRIVER.parent))

from sharded_transformer import TRAINED  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    processes.needs_gloo,
]
MODELS = [*(f"{spec} | tied={tied}" for spec, tied in TRAINED), "converted layer"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each process found, by case."""
    out = tmp_path_factory.mktemp("sharded") / "found.json"
    return processes.found(DRIVER, out)


@pytest.mark.parametrize("case", MODELS)
def test_two_processes_train_as_one_with_unequal_solves(found, case):
    first, second = (process[case] for process in found)
    assert first["evaluations"] != second["evaluations"]  # else nobody would have to wait
    assert first["apart"] <= 1e-6
    assert second["apart"] <= 1e-6


@pytest.mark.parametrize("case", MODELS)
def test_nothing_inside_of_a_solve_is_sharded_apart(found, case):
    groups = found[0][case]["groups"]
    assert "" in groups
    assert not [name for name in groups if "block" in name or "layers.1." in name]


def test_logits_caches_and_text_are_those_of_one_process(found):
    for process in found:
        assert process["evaluated"]["cached"]
        assert process["evaluated"]["logits"] <= 1e-9
        assert process["evaluated"]["same text"]


def test_a_block_that_is_sharded_apart_fills_caches_and_tells_attentions(found):
    for process in found:
        assert process["block apart"]["attentions"] <= 1e-9
        assert process["block apart"]["logits"] <= 1e-9
