"""A deep equilibrium classifier of handwritten digits in several processes.

    torchrun --nproc-per-node 2 examples/train_ddp.py
    torchrun --nproc-per-node 2 examples/train_ddp.py --grad "npg(k=9)" --out runs/ddp

One GPU a process where there are enough, the CPU otherwise. The batch is shared among the
processes, so that their number does not change the training. All that an equilibrium asks for
beyond what an ordinary layer does is `dpp.set_step`, and only for gradients that follow a schedule.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

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
        width: of h*.
    """

    def __init__(self, grad: str, width: int = 64) -> None:
        super().__init__()
        self.inject = nn.Linear(64, width)
        self.inner = nn.Linear(width, width, bias=False)
        self.classifier = nn.Linear(width, 10)
        # A contraction to begin with, so that there is an equilibrium.
        nn.init.orthogonal_(self.inner.weight, gain=0.7)
        self.deq = get_deq(grad=grad, f_solver="fixed_point_iter", f_max_iter=60, f_tol=1e-5)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of images, shape (B, 1, 8, 8)."""
        x = self.inject(images.flatten(1))
        states, _ = self.deq(lambda h: torch.tanh(self.inner(h) + x), torch.zeros_like(x))
        logits: Tensor = self.classifier(states[-1])
        return logits


def start() -> torch.device:
    """Join the other processes, and return the device of this one.

    Raises:
        SystemExit: if not started by torchrun.
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
    """Return the sum over all processes, over the sum of their counts."""
    both = torch.stack([total.detach().double(), total.new_tensor(count).double()])
    dist.all_reduce(both)
    return float(both[0] / both[1])


def main(argv: Sequence[str] | None = None) -> nn.Module:
    """Train, print losses and accuracies, save the model, and return it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--grad", default="upg", help="gradient of the equilibrium")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64, help="of all processes together")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--out", type=Path, default=Path("runs/ddp"), help="folder of the model")
    args = parser.parse_args(argv)

    device = start()
    rank, processes = dist.get_rank(), dist.get_world_size()
    if args.batch_size % processes:
        parser.error(f"--batch-size {args.batch_size} cannot be shared by {processes} processes")
    dpp.enable("torchdeq")  # TorchDEQ takes names from now on
    torch.manual_seed(0)
    digits = load_digits()
    data = TensorDataset(digits.train_images, digits.train_labels)
    sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(data, drop_last=True)
    loader = DataLoader(data, args.batch_size // processes, sampler=sampler, drop_last=True)
    test_images = digits.test_images[rank::processes].to(device)
    test_labels = digits.test_labels[rank::processes].to(device)

    model = Net(args.grad).to(device)
    parallel = DistributedDataParallel(model)  # all begin with the first process's weights
    optimizer = torch.optim.Adam(parallel.parameters(), args.lr)
    step = 0
    for epoch in range(args.epochs):
        model.train()
        sampler.set_epoch(epoch)  # another order
        total = torch.zeros((), device=device)
        for images, labels in loader:
            dpp.set_step(model, step)
            loss = F.cross_entropy(parallel(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
            step += 1
        model.eval()
        with torch.no_grad():
            right = (model(test_images).argmax(dim=1) == test_labels).sum()
        loss_mean, accuracy = mean(total, len(loader)), mean(right, len(test_labels))
        if rank == 0:
            print(f"epoch {epoch + 1}: loss {loss_mean:.4f}, accuracy {accuracy:.1%}", flush=True)
    if rank == 0:  # all have the same weights; one saves them
        args.out.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), args.out / "model.pt")
        print(f"saved {args.out / 'model.pt'}")
    dist.destroy_process_group()
    return model


if __name__ == "__main__":
    main()
