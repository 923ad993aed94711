"""Two processes give the gradients of one on the joint batch: DDP and FSDP2, on gloo."""

from __future__ import annotations

import sys

import pytest

import processes
from conftest import DRIVERS

DRIVER = DRIVERS / "distributed.py"
sys.path.append(str(DRIVER.parent))

from distributed import CASES, HOSTED, HOSTS, SPECS, STEPS  # noqa: E402

pytestmark = [
    processes.needs_gloo,
    pytest.mark.slow,
]
MODELS = [(host, spec) for host in HOSTS for spec in (SPECS if host == "own" else HOSTED)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("distributed") / "found.json"
    return processes.found(DRIVER, out)


def assert_same(apart):
    assert isinstance(apart, dict), apart
    assert apart["after 1"] <= 1e-6
    assert apart[f"after {STEPS}"] <= 1e-6


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("host", "spec"), MODELS)
def test_ddp(found, host, spec, case):
    assert_same(found["ddp"][f"{host} | {spec} | {case}"])


@pytest.mark.parametrize("spec", SPECS)
def test_parameters_that_f_uses_often_are_reduced_once(found, spec):
    assert found["reductions"][spec] == 1


@pytest.mark.parametrize(("host", "spec"), MODELS)
def test_fsdp2_of_the_whole_model(found, host, spec):
    assert_same(found["fsdp"][f"{host} | {spec} | whole"])


@pytest.mark.parametrize("spec", SPECS)
def test_fsdp2_with_f_sharded_apart(found, spec):
    assert_same(found["fsdp"][f"own | {spec} | F apart"])
