"""Trains with random depth in two processes with DDP, and writes what was drawn and how far it is.

torchrun --standalone --nproc-per-node 2 depths.py OUT.json
"""

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import deq_phantom_plugin as dpp
from in_processes import together, write

STEPS, CALLS = 8, 2
CASES = {
    "k": ("tbptt(k='uniform(1, 12)')", 12),
    "steps": ("tbptt('all')", "uniform(1, 12)"),
    "bptt": ("bptt('uniform(1, 12)')", 12),
    "reversible": ("reversible('uniform(1, 12)', 0.3)", 12),
    "per_call": ("tbptt(k='uniform(1, 12, per_call=True)')", 12),
    "per_process": ("tbptt(k='uniform(1, 12, per_process=True)')", 12),
    "per_process, of steps": ("tbptt('all')", "uniform(1, 12, per_process=True)"),
    "both": ("upg(k='uniform(1, 12, per_call=True, per_process=True)', lam=1.0)", 12),
}


class Net(nn.Module):
    """Two loops one after the other, each called several times in a forward pass."""

    def __init__(self, grad, steps):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 4).double()
        self.loops = nn.ModuleList(dpp.Equilibrium(grad=grad, steps=steps) for _ in range(2))
        self.seen = []
        for loop in self.loops:
            loop.observers.append((self.seen.append,))

    def forward(self, x, numbers=None):
        total = 0.0
        for call in range(CALLS):
            for index, loop in enumerate(self.loops):
                if numbers is not None:
                    loop.steps, loop.grad = numbers[call * len(self.loops) + index]
                total = total + loop(self.evaluate(x), torch.zeros_like(x)).square().mean()
        return total

    def evaluate(self, x):
        return lambda h: torch.tanh(self.inner(h) + x)


def numbers_of(model):
    """The length of each loop, and its strategy."""
    return [(solve.nfe, repr(solve.strategy)) for solve in model.seen]


def data(step, rank):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(3, 4, generator=generator, dtype=torch.float64)


def by_hand(model, step, numbers):
    """The mean gradient of the processes, each with the numbers that it has drawn."""
    grads = []
    for rank, drawn in enumerate(numbers):
        model.zero_grad()
        model(data(step, rank), drawn).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    return [sum(parts) / len(parts) for parts in zip(*grads, strict=True)]


def train(grad, steps):
    """The numbers of each step and process, and the largest relative error of a gradient."""
    rank, drawn, error = dist.get_rank(), [], 0.0
    model = Net(grad, steps)
    twin, wrapped = copy.deepcopy(model), DistributedDataParallel(model)
    for step in range(STEPS):
        dpp.set_step(wrapped, step)
        model.seen.clear()
        model.zero_grad()
        wrapped(data(step, rank)).backward()
        numbers = [None] * dist.get_world_size()
        dist.all_gather_object(numbers, numbers_of(model))
        drawn.append(numbers)
        twin.load_state_dict(model.state_dict())
        for got, want in zip(model.parameters(), by_hand(twin, step, numbers), strict=True):
            error = max(error, float((got.grad - want).norm() / want.norm()))
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    return {"drawn": drawn, "error": error}


def main():
    with together(30):
        write({name: train(*case) for name, case in CASES.items()})


if __name__ == "__main__":
    main()
