"""Trains small models in two processes and in one, and writes how far they end apart.

torchrun --standalone --nproc-per-node 2 distributed.py OUT.json
"""

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torchdeq import get_deq

import deq_phantom_plugin as dpp
from in_processes import together, write

SPECS = [
    "bptt(steps=6)",
    "exact",
    "guard('ift')",
    "ift",
    "ift(higher_order=True)",
    "ift(tol=1e-12, max_iter=100, warm_start=True)",
    "jfb",
    "npg",
    "npg(clip=0.4)",
    "reversible(steps=3)",
    "schedule({0: 'upg', 5: 'npg'})",
    "upg",
    "upg(k=3, checkpoint=True)",
    "upg(lam='adaptive')",
]
HOSTED = [*SPECS, "shine"]
HOSTS = ("own", "sliced", "indexing")  # a loop of one's own, and TorchDEQ's two cores
BATCH, WIDTH, STEPS = 8, 6, 10


class Model(nn.Module):
    """An equilibrium between two linear layers, solved by a loop of its own or by TorchDEQ."""

    def __init__(self, grad, host, checkpointed=False, unused=False):
        super().__init__()
        torch.manual_seed(0)
        self.inject, self.inner = nn.Linear(4, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, 2)
        self.unused = nn.Linear(3, 3) if unused else None
        nn.init.orthogonal_(self.inner.weight, 0.5)
        self.deq = self.memory = None
        if host != "own":
            # Near rounding, what Broyden's method learns of the Jacobian is rounding too.
            shine = grad.startswith("shine")
            solver, tol = ("broyden_fast", 1e-8) if shine else ("fixed_point_iter", 1e-13)
            settings = {"f_solver": solver, "f_max_iter": 60, "f_tol": tol}
            self.deq = get_deq(core=host, grad=grad, **settings)
        else:
            self.grad, self.memory = dpp.get_strategy(grad), dpp.Memory()
        self.checkpointed = checkpointed
        self.double()

    def equilibrium(self, u):
        func = lambda h: torch.tanh(self.inner(h) + u)  # noqa: E731
        start = torch.zeros_like(u)
        if self.deq is not None:
            return self.deq(func, start)[0][-1]
        context = dpp.Context(initial_state=start, memory=self.memory)
        with torch.no_grad():
            h = start
            for _ in range(60):
                h = func(h)
        return dpp.attach(func, h, self.grad, context)

    def forward(self, x):
        u = self.inject(x)
        if self.checkpointed:
            return self.out(checkpoint(self.equilibrium, u, use_reentrant=False))
        return self.out(self.equilibrium(u))


def data(step, part=slice(None)):
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(BATCH, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(BATCH, 2, generator=generator, dtype=torch.float64)
    return x[part], y[part]


def own_part():
    size = BATCH // dist.get_world_size()
    return slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)


def loss_of(model, x, y):
    return (model(x) - y).square().mean()


def train(model, module, part, accumulate=1):
    """Train, and yield the parameters after each step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)
    for step in range(STEPS):
        dpp.set_step(module, step)
        optimizer.zero_grad()
        x, y = data(step, part)
        for index, (a, b) in enumerate(zip(x.chunk(accumulate), y.chunk(accumulate), strict=True)):
            last = index == accumulate - 1
            synced = last or not hasattr(model, "no_sync")
            with torch.enable_grad() if synced else model.no_sync():
                (loss_of(model, a, b) / accumulate).backward()
        optimizer.step()
        yield [p.detach().clone() for p in module.parameters()]


def distance(got, want):
    """The largest relative error of a parameter."""
    return max(
        float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(got, want, strict=True)
    )


def compare(spec, host, accumulate=1, checkpointed=False, unused=False, **options):
    """How far a model trained in two processes is from one trained on the joint batch."""
    alone = Model(spec, host, checkpointed, unused)
    together = copy.deepcopy(alone)
    wrapped = DistributedDataParallel(together, **options)
    apart = [
        distance(got, want)
        for got, want in zip(
            train(wrapped, together, own_part(), accumulate),
            train(alone, alone, slice(None), accumulate),
            strict=True,
        )
    ]
    return {"after 1": apart[0], f"after {STEPS}": apart[-1]}


def reductions(spec):
    """How often the gradient of F's weight, which F uses again and again, is reduced in a step."""
    model = Model(spec, "own")
    wrapped = DistributedDataParallel(model, bucket_cap_mb=1e-6)  # a bucket a parameter
    counts = []

    def hook(state, bucket):
        counts.extend(p is model.inner.weight for p in bucket.parameters())
        return allreduce_hook(None, bucket)

    wrapped.register_comm_hook(None, hook)
    for step in range(2):  # the first rebuilds the buckets
        counts.clear()
        loss_of(wrapped, *data(step, own_part())).backward()
    return sum(counts)


def sharded(spec, host, parts):
    """The same with FSDP2, each of the named parts a group of its own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    alone = Model(spec, host)
    together = copy.deepcopy(alone)
    for name in parts:
        fully_shard(getattr(together, name), mesh=mesh)
    fully_shard(together, mesh=mesh)
    found = []
    wanted = train(alone, alone, slice(None))
    for _ in train(together, together, own_part()):
        whole = [p.full_tensor().detach() for p in together.parameters()]
        found.append(distance(whole, next(wanted)))
    return {"after 1": found[0], f"after {STEPS}": found[-1]}


CASES = {
    "plain": {},
    "no_sync": {"accumulate": 2},
    "find_unused_parameters": {"find_unused_parameters": True, "unused": True},
    "static_graph": {"static_graph": True},
    "checkpointed": {"checkpointed": True},
    "checkpointed, static_graph": {"checkpointed": True, "static_graph": True},
}


def guarded(function, *args, **kwargs):
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main():
    with together(20):
        dpp.enable("torchdeq")
        found = {"ddp": {}, "fsdp": {}, "reductions": {}}
        for host in HOSTS:
            for spec in SPECS if host == "own" else HOSTED:
                for name, options in CASES.items():
                    key = f"{host} | {spec} | {name}"
                    found["ddp"][key] = guarded(compare, spec, host, **options)
                found["fsdp"][f"{host} | {spec} | whole"] = guarded(sharded, spec, host, ())
        for spec in SPECS:
            found["reductions"][spec] = guarded(reductions, spec)
            # Each evaluation gathers the weights anew, so that all processes have to take as many.
            found["fsdp"][f"own | {spec} | F apart"] = guarded(sharded, spec, "own", ("inner",))
        write(found)


if __name__ == "__main__":
    main()
