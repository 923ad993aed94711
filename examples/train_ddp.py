"""Trains a deep equilibrium classifier of handwritten digits in several processes.

    torchrun --nproc-per-node 2 examples/train_ddp.py
    torchrun --nproc-per-node 2 examples/train_ddp.py --grad "npg(k=9)" --out runs/ddp

With checkpoints, so that training goes on from the last good one after a restart:

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # see docs/howto/distributed.md
    torchrun --nproc-per-node 2 --max-restarts 3 examples/train_ddp.py --save-every 20

Each process uses one GPU if there are enough of them, and the CPU otherwise. The batch is shared
among the processes, so their number does not change the training. In comparison with an ordinary
layer, an equilibrium needs two more things. `dpp.set_step` passes the training step to gradients
that follow a schedule. `dpp.memory_state_dict` in the checkpoints lets training go on after a
restart with the same numbers.
"""

from __future__ import annotations

import argparse
import os
import shutil
import zipfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.extras import require
from deq_phantom_plugin.compare import load_digits

get_deq = require("torchdeq", "vision").get_deq


class Net(nn.Module):
    """h* = tanh(W h* + U x + b), and a linear classifier of h*.

    Args:
        grad: a spec of `dpp.get_strategy`.
        width: the size of h*.
    """

    def __init__(self, grad: str, width: int = 64) -> None:
        super().__init__()
        self.inject = nn.Linear(64, width)
        self.inner = nn.Linear(width, width, bias=False)
        self.classifier = nn.Linear(width, 10)
        # With this gain F is a contraction at first, so that there is an equilibrium.
        nn.init.orthogonal_(self.inner.weight, gain=0.7)
        self.deq = get_deq(grad=grad, f_solver="fixed_point_iter", f_max_iter=60, f_tol=1e-5)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, shape (B, 10), of images of shape (B, 1, 8, 8)."""
        x = self.inject(images.flatten(1))
        states, _ = self.deq(lambda h: torch.tanh(self.inner(h) + x), torch.zeros_like(x))
        logits: Tensor = self.classifier(states[-1])
        return logits


class Checkpoints:
    """Checkpoints of all processes in one folder, each complete or not there at all.

    A checkpoint is a folder. It gets its name once all its files are on the disk, so a process may
    be killed at any time. The checksums in the files show later damage.

    Args:
        folder: the folder of the checkpoints, which all processes share.
        keep: the number of latest checkpoints that are kept.
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints, the latest first."""
        return sorted((int(p.name[5:]) for p in self.folder.glob("step_*[0-9]")), reverse=True)

    def save(self, step: int, shared: dict[str, Any], own: dict[str, Any]) -> None:
        """Save a checkpoint; all processes must call this.

        Args:
            step: the number of steps that were trained.
            shared: the state that is the same in all processes, such as weights. The first process
                saves it.
            own: the state that each process has for itself, such as the content of memories.
        """
        rank, part, whole = dist.get_rank(), self.folder / "part", self._path(step)
        if rank == 0:
            shutil.rmtree(part, ignore_errors=True)  # a killed process may have left it
            part.mkdir(parents=True)
            write({**shared, "step": step, "processes": dist.get_world_size()}, part / "shared.pt")
        dist.barrier()
        write(own, part / f"own_{rank}.pt")
        dist.barrier()
        if rank == 0:
            shutil.rmtree(whole, ignore_errors=True)  # there may be a damaged one
            part.rename(whole)
            for old in self.steps()[self.keep :]:
                shutil.rmtree(self._path(old))

    def load(self, device: torch.device) -> tuple[dict[str, Any], dict[str, Any] | None] | None:
        """Load the latest checkpoint that is good in all processes; all processes must call this.

        Returns:
            The shared state with its step, and the own state of this process. The own state is None
            in all processes if another number of processes has saved it. None in place of the pair
            if there is no good checkpoint.
        """
        rank, processes, found = dist.get_rank(), dist.get_world_size(), [self.steps()]
        dist.broadcast_object_list(found)  # a new folder may appear later on another machine
        for step in found[0]:
            files = [self._path(step) / name for name in ("shared.pt", f"own_{rank}.pt")]
            shared = read(files[0], device)
            fits = shared is not None and shared["processes"] == processes
            own = read(files[1], device) if fits else None
            if everywhere(shared is not None and fits == (own is not None), device):
                assert shared is not None
                return shared, own
            if rank == 0:
                print(f"{self._path(step)} is damaged, and is not used", flush=True)
        return None

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"


def write(state: dict[str, Any], path: Path) -> None:
    """Save a state, and return once it is on the disk."""
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path, device: torch.device) -> dict[str, Any] | None:
    """Return a saved state, or None if its file is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # reads the checksums, which torch.load does not check
    except (OSError, zipfile.BadZipFile):
        return None
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    return None if damaged else state


def everywhere(here: bool, device: torch.device) -> bool:
    """Return whether a condition holds in all processes."""
    both = torch.tensor(int(here), device=device)
    dist.all_reduce(both, dist.ReduceOp.MIN)
    return bool(both)


def start() -> torch.device:
    """Join the other processes, and return the device of this one.

    Raises:
        SystemExit: if torchrun has not started this process.
    """
    if not dist.is_torchelastic_launched():
        raise SystemExit("start it with: torchrun --nproc-per-node 2 examples/train_ddp.py")
    local, processes = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.cuda.device_count() >= processes:
        torch.cuda.set_device(local)
        dist.init_process_group("nccl")
        return torch.device("cuda", local)
    dist.init_process_group("gloo")
    return torch.device("cpu")


def mean(total: Tensor, count: int) -> float:
    """Return the sum over all processes, divided by the sum of their counts."""
    both = torch.stack([total.detach().double(), total.new_tensor(count).double()])
    dist.all_reduce(both)
    return float(both[0] / both[1])


def resume(
    checkpoints: Checkpoints,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> int:
    """Load the latest good checkpoint, and return its step; 0 if there is none."""
    found = checkpoints.load(device)
    if found is None:
        return 0
    shared, own = found
    model.load_state_dict(shared["model"])
    optimizer.load_state_dict(shared["optimizer"])
    # All processes load their memory, or none does, since `auto` measures in all of them at once.
    dpp.load_memory_state_dict(model, own["memory"] if own else {})
    if dist.get_rank() == 0:
        print(f"goes on after step {shared['step']}", flush=True)
    return int(shared["step"])


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--grad", default="upg", help="gradient of the equilibrium")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64, help="of all processes together")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--out", type=Path, default=Path("runs/ddp"), help="folder of the model")
    parser.add_argument("--save-every", type=int, default=0, help="steps; 0: only at the end")
    parser.add_argument("--resume", action="store_true", help="go on, as a restart does by itself")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> nn.Module:
    """Train, print losses and accuracies, save the model, and return it."""
    args = arguments(argv)
    device = start()
    rank, processes = dist.get_rank(), dist.get_world_size()
    if args.batch_size % processes:
        raise SystemExit(
            f"{processes} processes cannot share --batch-size {args.batch_size} equally; expected "
            f"a multiple of {processes}"
        )
    dpp.enable("torchdeq")  # TorchDEQ takes names from now on
    torch.manual_seed(0)
    digits = load_digits()
    data = TensorDataset(digits.train_images, digits.train_labels)
    sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(data, drop_last=True)
    loader = DataLoader(data, args.batch_size // processes, sampler=sampler, drop_last=True)
    test_images = digits.test_images[rank::processes].to(device)
    test_labels = digits.test_labels[rank::processes].to(device)

    model = Net(args.grad).to(device)
    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    checkpoints, step = Checkpoints(args.out / "checkpoints"), 0
    if args.resume or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        step = resume(checkpoints, model, optimizer, device)
    elif checkpoints.steps():
        raise SystemExit(
            f"{checkpoints.folder} has checkpoints of another run, which would be replaced; pass "
            "--resume to go on with it, or another folder as --out"
        )
    parallel = DistributedDataParallel(model)  # copies the weights of the first process to all
    steps = args.epochs * len(loader)
    for epoch in range(step // len(loader), args.epochs):
        model.train()
        sampler.set_epoch(epoch)  # each epoch has another order
        total, begun = torch.zeros((), device=device), step
        for images, labels in islice(loader, step % len(loader), None):
            dpp.set_step(model, step, total=steps)
            loss = F.cross_entropy(parallel(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
            step += 1
            if args.save_every and step % args.save_every == 0:
                shared = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                checkpoints.save(step, shared, {"memory": dpp.memory_state_dict(model)})
        model.eval()
        with torch.no_grad():
            right = (model(test_images).argmax(dim=1) == test_labels).sum()
        loss_mean, accuracy = mean(total, step - begun), mean(right, len(test_labels))
        if rank == 0:
            print(f"epoch {epoch + 1}: loss {loss_mean:.4f}, accuracy {accuracy:.1%}", flush=True)
    if rank == 0:  # all processes have the same weights, so one saves them
        args.out.mkdir(parents=True, exist_ok=True)
        write(model.state_dict(), args.out / "model.part")
        (args.out / "model.part").replace(args.out / "model.pt")
        print(f"saved {args.out / 'model.pt'}")
    dist.destroy_process_group()
    return model


if __name__ == "__main__":
    main()
