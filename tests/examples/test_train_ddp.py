from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from conftest import ROOT

pytest.importorskip("torchdeq")
pytest.importorskip("sklearn")

EXAMPLE = ROOT / "examples" / "train_ddp.py"
pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this PyTorch has no gloo",
)
# Runs the example and saves what each process ends with.
SCRIPT = """
import os, sys
import torch
sys.path.insert(0, sys.argv[1])
import train_ddp
state = train_ddp.main(sys.argv[3:]).state_dict()
torch.save(state, os.path.join(sys.argv[2], os.environ["RANK"] + ".pt"))
"""


def run(folder, processes, *options):
    """Return the ended command and the weights of each process."""
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(SCRIPT)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    arguments = [str(script), str(EXAMPLE.parent), str(folder), "--out", str(folder), *options]
    ended = subprocess.run(
        [sys.executable, *launch, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended, [torch.load(folder / f"{rank}.pt") for rank in range(processes)]


@pytest.mark.slow
def test_two_processes_end_with_the_same_weights_and_with_those_of_one(tmp_path):
    ended, (first, second) = run(tmp_path / "two", 2, "--epochs", "1")
    lines = ended.stdout.splitlines()
    assert [line.split(":")[0].split(" ")[0] for line in lines] == ["epoch", "saved"]
    saved = torch.load(tmp_path / "two" / "model.pt")
    _, (alone,) = run(tmp_path / "one", 1, "--epochs", "1")
    for name, weight in first.items():
        assert torch.equal(weight, second[name])
        assert torch.equal(weight, saved[name])
        torch.testing.assert_close(weight, alone[name], rtol=1e-3, atol=1e-4)


def test_without_torchrun_it_says_how_to_start_it():
    ended = subprocess.run(
        [sys.executable, str(EXAMPLE)], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 1
    assert ended.stderr == ("start it with: torchrun --nproc-per-node 2 examples/train_ddp.py\n")
