from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from conftest import ROOT, load_example

pytest.importorskip("torchdeq")
pytest.importorskip("sklearn")

EXAMPLE = ROOT / "examples" / "train_ddp.py"
pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this PyTorch has no gloo",
)
# Runs the example and saves what each process ends with. The second process is killed, if it is to
# be, in so manieth a forward pass of its first life.
SCRIPT = """
import os, signal, sys
import torch
sys.path.insert(0, sys.argv[1])
import train_ddp
left = int(os.environ.get("KILLED_AT", "0"))
forward = train_ddp.Net.forward

def until_killed(self, images):
    global left
    left -= 1
    if left == 0 and os.environ["TORCHELASTIC_RESTART_COUNT"] + os.environ["RANK"] == "01":
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(self, images)

train_ddp.Net.forward = until_killed
state = train_ddp.main(sys.argv[3:]).state_dict()
torch.save(state, os.path.join(sys.argv[2], os.environ["RANK"] + ".pt"))
"""


def run(folder, processes, *options, killed_at=0):
    """Return the ended command and the weights of each process."""
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(SCRIPT)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    launch += ["--max-restarts", "1" if killed_at else "0"]
    # Without it PyTorch's processes may find the addresses of those before the restart.
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "KILLED_AT": str(killed_at)}
    arguments = [str(script), str(EXAMPLE.parent), str(folder), "--out", str(folder), *options]
    ended = subprocess.run(
        [sys.executable, *launch, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | environment,
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


@pytest.mark.slow
def test_after_a_kill_it_ends_with_the_weights_of_a_run_that_was_not_stopped(tmp_path):
    """Every bit, in the second epoch, three steps after the last checkpoint."""
    options = ["--epochs", "2", "--grad", "auto(every=10)", "--save-every", "10"]
    ended, weights = run(tmp_path / "killed", 2, *options, killed_at=35)
    assert "goes on after step 30" in ended.stdout
    _, whole = run(tmp_path / "whole", 2, *options)
    for got, want in zip(weights, whole, strict=True):
        assert all(torch.equal(got[name], weight) for name, weight in want.items())


@pytest.fixture
def checkpoints(tmp_path):
    """Three of a process that is alone, with the step in them."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    kept = load_example("train_ddp").Checkpoints(tmp_path)
    for step in (1, 2, 3, 4):
        kept.save(step, {"weight": torch.full((1000,), step)}, {"memory": {"of": step}})
    yield kept
    dist.destroy_process_group()


def test_of_checkpoints_the_latest_stay(checkpoints):
    assert checkpoints.steps() == [4, 3, 2]
    shared, own = checkpoints.load(torch.device("cpu"))
    assert (shared["step"], shared["weight"][0], own["memory"]) == (4, 4, {"of": 4})


@pytest.mark.parametrize("name", ["shared.pt", "own_0.pt"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda file: os.truncate(file, file.stat().st_size // 2),
        lambda file: os.truncate(file, 0),
        lambda file: file.unlink(),
    ],
    ids=["cut short", "empty", "gone"],
)
def test_a_damaged_checkpoint_is_not_taken(checkpoints, name, damage, capsys):
    damage(checkpoints.folder / "step_00000004" / name)
    assert checkpoints.load(torch.device("cpu"))[0]["weight"][0] == 3
    assert "step_00000004 is damaged" in capsys.readouterr().out


def test_a_changed_number_is_damage(checkpoints):
    file = checkpoints.folder / "step_00000004" / "shared.pt"
    content = file.read_bytes()
    number = (4).to_bytes(8, "little")
    assert number * 1000 in content
    file.write_bytes(content.replace(number * 1000, number * 999 + b"\0" * 8))
    assert torch.load(file)["weight"][-1] == 0  # which says nothing of it
    assert checkpoints.load(torch.device("cpu"))[0]["step"] == 3


def test_what_was_not_finished_is_no_checkpoint(checkpoints):
    (checkpoints.folder / "part").mkdir()
    (checkpoints.folder / "part" / "own_0.pt").write_bytes(b"half")
    assert checkpoints.load(torch.device("cpu"))[0]["step"] == 4
    checkpoints.save(5, {}, {})
    assert checkpoints.steps() == [5, 4, 3]


def test_another_number_of_processes_takes_what_they_share(checkpoints):
    file = checkpoints.folder / "step_00000004" / "shared.pt"
    torch.save(torch.load(file) | {"processes": 2}, file)
    shared, own = checkpoints.load(torch.device("cpu"))
    assert (shared["step"], own) == (4, None)


def test_without_torchrun_it_says_how_to_start_it():
    ended = subprocess.run(
        [sys.executable, str(EXAMPLE)], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 1
    assert ended.stderr == ("start it with: torchrun --nproc-per-node 2 examples/train_ddp.py\n")
