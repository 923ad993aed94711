"""Cases of lockstep in which processes do different things in a step, or do a part of it again.

torchrun --standalone --nproc-per-node 2 lockstep_unequal.py OUT.json [NAME ...]
"""

import copy
import functools
import sys

import torch
import torch.distributed as dist
from lockstep_cases import (
    SECONDS,
    Net,
    data,
    distance,
    everywhere,
    guarded,
    own,
    part,
    sharded,
    train,
    whole,
)
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from torchdeq import get_deq

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.communication import Communication
from in_processes import together, write

FALLBACK = "guard('ift(max_iter=4)', on_failure=\"fallback('upg(k=3)')\", adjoint_tol=1e-3)"
REPEATED = ["ift(tol=1e-10)", "jfb", "npg(lam='adaptive')", "upg", "upg(checkpoint=True)", FALLBACK]
LOOPS = [
    "bptt",
    "guard('npg')",
    "ift(tol=1e-10)",
    "npg",
    "tbptt('all')",
    "tbptt(k=2)",
    "upg(k=2)",
    "upg(k=2, lam='adaptive')",
    "upg(k=9)",
    "upg(k=9, lam='adaptive')",
]
EMPTY = ["auto", "guard('ift', on_failure=\"fallback('upg(k=2)')\")", "ift(tol=1e-10)"]
METHODS = "auto(methods=['jfb', 'npg(k=3)', 'ift'])"


class Repeated(Net):
    """A model that does its forward pass again in backward."""

    def __init__(self, grad, use_reentrant):
        super().__init__(grad)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        u = self.inject(x)
        return self.out(checkpoint(self.equilibrium, u, use_reentrant=self.use_reentrant))


class Loop(Net):
    """A model with a loop in place of a solve."""

    def __init__(self, grad):
        super().__init__()
        self.deq = dpp.Equilibrium(grad=grad, steps=6)
        self.double()


class Nested(Net):
    """An equilibrium whose F has an equilibrium of its own."""

    def __init__(self, grad, inside):
        super().__init__(grad)
        self.inside = dpp.Equilibrium("fixed_point", inside, tol=1e-11, max_iter=300)
        self.double()

    def func(self, u, h):
        self.calls += 1
        inside = self.inside(lambda z: torch.tanh(self.inner(z) / 2 + 0.3 * h), torch.zeros_like(h))
        return torch.tanh(0.8 * inside + u)


class Sampled(Net):
    """TorchDEQ's states on the way of a solve, which ends early for easy samples."""

    def __init__(self, core, **options):
        super().__init__(core=core, solver="fixed_point_iter")
        settings = {"f_solver": "fixed_point_iter", "f_tol": 1e-10, "f_max_iter": 80, **options}
        self.deq = get_deq(core=core, grad="ift(tol=1e-10)", **settings)
        self.double()

    def forward(self, x):
        u = self.inject(x)
        states = self.deq(functools.partial(self.func, u), torch.zeros_like(u))[0]
        return sum(self.out(state) for state in states) / len(states)


def compared(made, *args, training=train, fsdp=None, **options):
    """How far a model that several processes train is from one trained on the joint batch."""
    alone = made(*args, **options)
    both = sharded(copy.deepcopy(alone), **(fsdp or {}))
    error = distance(training(both, part()), training(alone, slice(None)))
    return {"error": error, "calls": everywhere(both.calls)}


def accumulated(model, at):
    """Train, two batches a step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for number in range(4):
        if hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(number % 2 == 1)
        dpp.set_step(model, number // 2)
        x, y = data(number)
        (model(x[at]) - y[at]).square().mean().backward()
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
    return [whole(p.detach()) for p in model.parameters()]


def caught(model, at):
    """Train after errors in one process, in a solve and in backward, which all catch."""
    if hasattr(model, "set_requires_gradient_sync"):
        for fails_at in (3, 30, 78):
            model.calls, model.fails_at = 0, fails_at if dist.get_rank() == 1 else None
            x, y = data(0)
            try:
                (model(x[at]) - y[at]).square().mean().backward()
            except (ArithmeticError, RuntimeError):
                model.reset_iter_state()  # or FSDP2 takes the weights of this step in the next
            else:
                raise AssertionError("nothing was raised")
        model.fails_at = None
    return train(model, at)


def one_without(what, grad):
    """The first process has no samples, or none that count; whether they couple is asked."""
    both, x, y = sharded(Net(grad)), *(t[part()] for t in data(0))
    dpp.set_step(both, 0)
    first = dist.get_rank() == 0
    if what == "samples" and first:
        x, y = x[:0], y[:0]
    weight = 0.0 if what == "gradient" and first else 1.0
    (weight * (both(x) - y).square().sum()).backward()
    wanted, x, y = Net("ift(tol=1e-10)"), *(t[part(1)] for t in data(0))
    (wanted(x) - y).square().sum().backward()
    got = [whole(p.grad) * 2 for p in both.inner.parameters()]  # of a mean over processes
    error = distance(got, [p.grad for p in wanted.inner.parameters()])
    chosen = everywhere([choice.spec for choice in dpp.report_choice(both)])
    return {"error": error, "calls": everywhere(both.calls), "chosen": chosen}


def split_loop(grad, dim):
    """A loop whose state is split over processes, and begins at one with a gradient."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, ends = init_device_mesh("cpu", (dist.get_world_size(),)), []
    for splits in (True, False):
        torch.manual_seed(0)

        def made(*shape, at=None, splits=splits):
            t = torch.randn(*shape, dtype=torch.float64)
            t = distribute_tensor(t, mesh, [at or Replicate()]) if splits else t
            return (0.25 * t.detach()).requires_grad_()

        u, start = made(4, 8, 6, at=Shard(dim)), made(4, 8, 6, at=Shard(dim))
        w, mixes = made(6, 6), made(8, 8)

        def func(h, u=u, w=w, mixes=mixes, splits=splits):
            image = torch.tanh(torch.einsum("st,btd->bsd", mixes, h) @ w + u)
            return image.redistribute(mesh, [Shard(dim)]) if splits else image

        found = dpp.loop(func, start, 6, grad)
        whole(found).square().sum().backward()
        grads = [t.grad for t in (u, w, mixes, start) if t.grad is not None]
        ends.append([whole(t) for t in (found.detach(), *grads)])
    return {"error": distance(*ends), "calls": [0]}


def sequence_and_data():
    """A state split over its sequence in pairs, whose F has weights that FSDP2 splits across them.

    The first pair has easy samples, so that neither of the two groups alone is enough.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    pair, ends = dist.get_rank() // 2, []
    over = mesh["sequence"]
    for splits in (True, False):
        torch.manual_seed(0)
        linear = nn.Linear(6, 6).double()
        with torch.no_grad():
            linear.weight.mul_(0.5)
        u, mixes = torch.randn(8, 8, 6).double(), 0.2 * torch.randn(8, 8).double()
        u[:4] *= 20
        if splits:
            fully_shard(linear, mesh=mesh["data"])
            u = distribute_tensor(u[4 * pair : 4 * pair + 4], over, [Shard(1)])
        calls = [0]

        def func(h, u=u, linear=linear, splits=splits, calls=calls, mixes=mixes):
            calls[0] += 1
            h = h.full_tensor() if splits else h
            image = torch.tanh(linear(torch.einsum("st,btd->bsd", mixes, h)))
            if splits:
                image = DTensor.from_local(image, over, [Replicate()], run_check=False)
                image = image.redistribute(over, [Shard(1)])
            return torch.tanh(image + u)

        settings = {"tol": 1e-10, "max_iter": 300, "batch_dim": 0}
        equilibrium = dpp.Equilibrium("fixed_point", "ift(tol=1e-10)", **settings)
        found = equilibrium(func, torch.zeros_like(u))
        whole(found).square().sum().backward()
        ends.append((whole(linear.weight.grad), calls[0], int(equilibrium.last.nfe)))
    (got, n_calls, needed), (want, _, _) = ends
    found = {"error": distance([2 * got], [want]), "calls": everywhere(n_calls)}
    return {**found, "needed": everywhere(needed)}


def cached(grad):
    """F's weight is computed once for a step; each process's gradient beside that of it alone.

    The first process has solved while the other one still evaluates F without autograd.
    """
    grads = []
    for told in (dist.group.WORLD, None):
        model = Net(grad, "own", tol=None, max_iter=None, process_group=told)
        model.collective = told is not None
        parametrize.register_parametrization(model.inner, "weight", Tripled())
        with parametrize.cached():
            x, y = (t[part()] for t in data(0))
            (model(x) - y).square().mean().backward()
        grads.append(model.inner.parametrizations.weight.original.grad)
    found = 1.0 if grads[0] is None else distance(grads[:1], grads[1:])
    return {"error": max(everywhere(found)), "calls": [0]}


class Tripled(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return 3 * weight

    def right_inverse(self, weight):
        return weight / 3


def looked():
    """How often a solve looks at modules, told that F does not communicate and not told."""
    n, enter = [0], Communication.__enter__

    def counted(self):
        n[0] += 1
        return enter(self)

    Communication.__enter__ = counted
    found = {}
    for group in (None, "auto"):
        n[0] = 0
        for solver in ("anderson", "broyden", "fixed_point", own):
            options = {"tol": None, "max_iter": None} if solver is own else {}
            model = Net("ift", solver, process_group=group, **options)
            model(data(0)[0]).sum().backward()
        found[f"{group}"] = n[0]
    Communication.__enter__ = enter
    return found


def cases():
    from torch.distributed.fsdp import CPUOffloadPolicy

    found = {}
    for grad in REPEATED:
        for use_reentrant in (True, False):
            name = f"{'reentrant' if use_reentrant else 'repeated'} | {grad}"
            found[name] = functools.partial(compared, Repeated, grad, use_reentrant)
    for grad in LOOPS:
        found[f"loop | {grad}"] = functools.partial(compared, Loop, grad)
        found[f"split loop | {grad}"] = functools.partial(split_loop, grad, 1)
    found["split loop | batch"] = functools.partial(split_loop, "upg(k=9, lam='adaptive')", 0)
    for outside, inside in (("ift(tol=1e-10)", "ift(tol=1e-11)"), ("upg", "upg"), ("auto", "auto")):
        found[f"nested | {outside}"] = functools.partial(compared, Nested, outside, inside)
    found["three states"] = functools.partial(compared, Sampled, "sliced", n_states=3)
    steps = {"core": "indexing", "indexing": [10, 50]}
    found["all states"] = functools.partial(compared, Sampled, f_tol=0.0, **steps)
    for grad in EMPTY:
        found[f"without samples | {grad}"] = functools.partial(one_without, "samples", grad)
    for what in ("samples", "gradient"):
        found[f"methods without {what}"] = functools.partial(one_without, what, METHODS)
    offload = CPUOffloadPolicy(pin_memory=False)
    for name, how in {
        "kept": {"fsdp": {"reshard_after_forward": False}},
        "offloaded": {"fsdp": {"offload_policy": offload}},
        "accumulated": {"training": accumulated},
        "caught": {"training": caught},
        "adaptive": {},
    }.items():
        grad = "upg(lam='adaptive')" if name in ("adaptive", "kept") else "ift(tol=1e-10)"
        found[name] = functools.partial(compared, Net, grad, **how)
    for grad in ("jfb", "upg"):
        found[f"cached | {grad}"] = functools.partial(cached, grad)
    return found | {
        "states left out": functools.partial(compared, Sampled, **steps),
        "sequence and data": sequence_and_data,
        "looked": looked,
    }


def main():
    with together(SECONDS):
        dpp.enable("torchdeq")
        known = cases()
        names = sys.argv[2:] or [name for name in known if name != "sequence and data"]
        write({name: guarded(known[name]) for name in names})


if __name__ == "__main__":
    main()
