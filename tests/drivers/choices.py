"""Trains with `auto` in two processes, one of which has harder samples, and writes what they chose.

torchrun --standalone --nproc-per-node 2 choices.py OUT.json
"""

import io

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import deq_phantom_plugin as dpp
from in_processes import together, write

EVERY, STEPS, ROWS = 4, 10, (8, 4)
GRAD = f"auto(cosine=0.97, every={EVERY})"
METHODS = f"auto(cosine=0.97, every={EVERY}, methods=['jfb', 'npg(k=4)', 'upg(k=9)', 'ift'])"
CASES = {
    "plain": {},
    "methods": {"grad": METHODS},
    "jfb": {"grad": "auto(methods=['jfb'])"},
    "no_sync": {"accumulate": 2},
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "fsdp": {"sharded": True},
    "overflow": {"overflow": 0},
    "no samples": {"without": True},
    "resumed": {"resumed": 5},
}


class Net(nn.Module):
    """An equilibrium between two linear layers."""

    def __init__(self, grad=GRAD):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.out = nn.Linear(12, 12), nn.Linear(12, 2)
        nn.init.orthogonal_(self.inner.weight, 0.95)
        self.equilibrium = dpp.Equilibrium("fixed_point", grad, tol=1e-8, max_iter=500, batch_dim=0)
        self.double()

    def forward(self, x):
        return self.out(self.equilibrium(lambda h: torch.tanh(self.inner(h) + x), x))


def data(step, rank):
    """Where x is large F is flat, so that the samples of the first process are the easy ones."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(ROWS[rank], 12, generator=generator, dtype=torch.float64)
    return x * (3.0, 0.1)[rank]


def choices_of(model):
    return [(r.step, r.spec, r.cosine, r.cost) for r in dpp.report_choice(model)]


def train(
    grad=GRAD, accumulate=1, sharded=False, overflow=None, without=False, resumed=None, **ddp
):
    """What each process chose."""
    rank, model = dist.get_rank(), Net(grad)
    wrapped = model
    if sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    else:
        wrapped = DistributedDataParallel(model, **ddp)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for step in range(STEPS):
        if step == resumed:
            model = resume(model, grad)
            wrapped = DistributedDataParallel(model, **ddp)
            optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        dpp.set_step(wrapped, step)
        optimizer.zero_grad()
        for part, x in enumerate(data(step, rank).chunk(accumulate)):
            synced = part == accumulate - 1 or sharded
            loss = wrapped(x).square().mean()
            if rank == 1 and (without or step == overflow):
                loss = loss * (0.0 if without else float("inf"))
            with torch.enable_grad() if synced else wrapped.no_sync():
                loss.backward()
        if step != overflow:  # which GradScaler would drop
            optimizer.step()
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, choices_of(model))
    return found


def resume(model, grad):
    """The model after a way through a file."""
    file = io.BytesIO()
    torch.save([model.state_dict(), dpp.memory_state_dict(model)], file)
    file.seek(0)
    state, memory = torch.load(file, weights_only=True)
    other = Net(grad)
    other.load_state_dict(state)
    dpp.load_memory_state_dict(other, memory)
    return other


def main():
    with together(120):
        write({name: train(**case) for name, case in CASES.items()})


if __name__ == "__main__":
    main()
