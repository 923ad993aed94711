"""Trains models whose F communicates, in several processes and in one, and writes what happened.

torchrun --standalone --nproc-per-node 2 lockstep_cases.py OUT.json [NAME ...]

The first samples are far easier than the last, so that processes need different numbers of
evaluations and products.
"""

import copy
import functools
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchdeq import get_deq

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.exchange import Hosts
from in_processes import everywhere, together, write

WIDTH, BATCH, STEPS = 6, 8, 3
SECONDS = 60  # until the group gives up
SPECS = [
    "bptt(steps=6)",
    "exact",
    "guard('ift')",
    "guard('ift(max_iter=4)', on_failure=\"fallback('upg(k=3)')\", adjoint_tol=1e-3)",
    "guard('ift(max_iter=4)', on_failure=\"fallback('ift(tol=1e-10)')\", adjoint_tol=1e-3)",
    "ift(tol=1e-10)",
    "ift(tol=1e-10, higher_order=True)",
    "ift(tol=1e-10, warm_start=True)",
    "ift(tol=1e-10, solver='anderson')",
    "ift(tol=1e-10, solver='bicgstab')",
    "ift(tol=1e-10, solver='broyden')",
    "ift(tol=1e-10, solver='fixed_point', max_iter=200)",
    "ift(tol=1e-10, solver='fixed_point', max_iter=200, clip=3.0)",
    "jfb",
    "npg",
    "npg(clip=0.4)",
    "npg(lam='adaptive')",
    "npg(k='uniform(2, 6)')",
    "npg_rr",
    "ramp('npg', {'k': (2, 8)}, until=3)",
    "reversible(steps=3)",
    "schedule({0: 'upg', 2: 'ift(tol=1e-10)'})",
    "tbptt(k=2)",
    "upg",
    "upg(k=3, checkpoint=True)",
    "upg(lam='adaptive')",
]
SOLVERS = {
    "anderson": {"solver": "anderson"},
    "broyden": {"solver": "broyden", "max_iter": 60},
    "fixed_point": {"solver": "fixed_point"},
    "a function": {"solver": "own", "tol": None, "max_iter": None},
}
HOSTED = ["anderson", "anderson_fast", "broyden", "broyden_fast", "fixed_point_iter"]

SPLIT = [
    "bptt(steps=6)",
    "exact",
    "guard('ift(max_iter=2)', on_failure=\"fallback('upg(k=3)')\", adjoint_tol=1e-3)",
    "ift(tol=1e-10)",
    "jfb",
    "npg",
    "npg(clip=0.4)",
    "npg(lam='adaptive')",
    "npg_rr",
    "reversible(steps=3)",
    "upg",
    "upg(lam='adaptive')",
]


class Net(nn.Module):
    """An equilibrium between two linear layers."""

    def __init__(self, grad="upg", solver="fixed_point", core=None, start=None, **options):
        super().__init__()
        torch.manual_seed(0)
        self.inject, self.inner = nn.Linear(4, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, 2)
        nn.init.orthogonal_(self.inner.weight, 0.9)
        self.core, self.start, self.checkpointed = core, start, options.pop("checkpointed", False)
        self.collective = options.pop("collective", False)
        if core is None:
            options = {"tol": 1e-10, "max_iter": 300, **options}
            self.deq = dpp.Equilibrium(own if solver == "own" else solver, grad, **options)
        else:
            settings = {"f_solver": solver, "f_tol": 1e-10, "f_max_iter": 80}
            self.deq = get_deq(core=core, grad=grad, **settings)
        self.calls, self.fails_at, self.is_killed = 0, None, False
        self.double()

    def func(self, u, h):
        self.calls += 1
        if self.calls == -(self.fails_at or 0):
            raise ArithmeticError("F has failed before it communicates")
        image = torch.tanh(self.inner(h) + u)
        if self.calls == self.fails_at:
            if self.is_killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ArithmeticError("F has failed")
        if self.collective:
            dist.all_reduce(torch.zeros(1))
        return image

    def equilibrium(self, u):
        start = torch.zeros_like(u) if self.start is None else self.start
        found = self.deq(functools.partial(self.func, u), start)
        return found if self.core is None else found[0][-1]

    def forward(self, x):
        u = self.inject(x)
        if self.checkpointed:
            return self.out(checkpoint(self.equilibrium, u, use_reentrant=False))
        return self.out(self.equilibrium(u))


def own(func, state):
    """A solver as a user may write it."""
    for _ in range(300):
        new = func(state)
        if bool(((new - state).norm() <= 1e-10 * new.norm()).all()):
            return new
        state = new
    return state


def data(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(BATCH, 2, generator=generator, dtype=torch.float64)
    x[: BATCH // 2] *= 20
    return x, y


def part(rank=None):
    size, rank = BATCH // dist.get_world_size(), dist.get_rank() if rank is None else rank
    return slice(rank * size, (rank + 1) * size)


def sharded(model, names=("inner", ""), **options):
    """Shard modules of a model by FSDP2, each in a group of its own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name in names:
        fully_shard(model.get_submodule(name), mesh=mesh, **options)
    return model


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train(model, at, steps=STEPS):
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    torch.manual_seed(3)
    for step in range(steps):
        dpp.set_step(model, step, total=steps)
        x, y = data(step)
        optimizer.zero_grad()
        (model(x[at]) - y[at]).square().mean().backward()
        optimizer.step()
    return [whole(p.detach()) for p in model.parameters()]


def distance(got, want):
    """The largest relative error of a parameter."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(got, want, strict=True))


def compared(**options):
    """How far a model that several processes train is from one trained on the joint batch.

    Also the evaluations of each process, and what their own samples needed.
    """
    alone = Net(**options)
    both = sharded(copy.deepcopy(alone))
    found = {"error": distance(train(both, part()), train(alone, slice(None)))}
    needed = both.deq.last.nfe.item() if both.core is None else None
    return {**found, "calls": everywhere(both.calls), "needed": everywhere(needed)}


def inner_alone():
    """Only F is sharded: the gradient of its own weight, after one pass."""
    model = Net("ift(tol=1e-10)")
    both = sharded(copy.deepcopy(model), ("inner",))
    grads = []
    for net, at in ((both, part()), (model, slice(None))):
        x, y = data(0)
        (net(x[at]) - y[at]).square().mean().backward()
        grads.append([whole(p.grad) for p in net.inner.parameters()])
    return {"error": distance(*grads), "calls": everywhere(both.calls)}


def evaluated(mode):
    """What evaluation finds, without autograd or in inference mode."""
    model = Net().eval()
    both = sharded(copy.deepcopy(model))
    x = data(0)[0]
    with mode():
        got, want = both(x[part()]), model(x)[part()]
    return {"error": distance([got], [want]), "calls": everywhere(both.calls)}


def without(what):
    """One process has nothing to do: no samples, none that count, or all done at the start."""
    model = Net("ift(tol=1e-10)", batch_dim=0)
    both, first = sharded(copy.deepcopy(model)), dist.get_rank() == 0
    x, y = data(0)
    x, y = x[part()], y[part()]
    if what == "samples":
        x, y = (x[:0], y[:0]) if first else (x, y)
    if what == "solve" and first:
        with torch.no_grad():
            model(x)
            u = model.inject(x)
            both.start = own(functools.partial(model.func, u), torch.zeros_like(u))
    weight = 0.0 if what == "gradient" and first else 1.0
    (weight * (both(x) - y).square().sum()).backward()
    wanted = [Net("ift(tol=1e-10)", batch_dim=0) for _ in range(2)]
    for rank, net in enumerate(wanted):
        a, b = (t[part(rank)] for t in data(0))
        keep = 0.0 if rank == 0 and what != "solve" else 1.0
        (keep * (net(a) - b).square().sum()).backward()
    pairs = zip(*(net.inner.parameters() for net in wanted), strict=True)
    want = [(p.grad + q.grad) / 2 for p, q in pairs]
    got = [whole(p.grad) for p in both.inner.parameters()]
    return {"error": distance(got, want), "calls": everywhere(both.calls)}


def failing(at, spec="ift(tol=1e-10)", rank=1, before=1):
    """F raises in one process: what each of them says, and after how many seconds.

    After some alike steps it is in the middle of evaluations that were agreed on.
    """
    both = sharded(Net(spec))
    for _ in range(before):
        train(both, part(), steps=1)
    both.calls, both.fails_at = 0, at if dist.get_rank() == rank else None
    start = time.perf_counter()
    try:
        train(both, part(), steps=1)
        said = "nothing"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    return {"said": everywhere(said), "seconds": everywhere(time.perf_counter() - start)}


def alike(shrinks):
    """Steps that take equally many evaluations, and perhaps one at last that takes fewer.

    The error as above; evaluations and exchanges of the last step.
    """
    alone = Net("ift(tol=1e-10)")
    both = sharded(copy.deepcopy(alone))
    exchanges, least = [0], Hosts.least

    def counted(*args):
        exchanges[0] += 1
        return least(*args)

    ends = []
    for net, at in ((alone, slice(None)), (both, part())):
        optimizer = torch.optim.SGD(net.parameters(), 0.0)
        for step in range(6):
            x, y = data(0)
            if step == 5:
                x = 1e3 * x if shrinks else x  # tanh is flat there
                net.calls, Hosts.least = 0, counted
            optimizer.zero_grad()
            (net(x[at]) - y[at]).square().mean().backward()
            optimizer.step()
        Hosts.least = least
        ends.append([whole(p.grad) for p in net.parameters()])
    found = {"error": distance(ends[1], ends[0]), "calls": everywhere(both.calls)}
    return {**found, "needed": alone.calls, "exchanges": exchanges[0]}


def dying_within():
    """F raises in one process between two gathers of unequal size, in evaluations agreed on."""
    both = Net("ift(tol=1e-10)")
    both.inner = nn.Sequential(nn.Linear(WIDTH, 2), nn.Linear(2, WIDTH)).double()
    sharded(both, ("inner.0", "inner.1", ""))
    for _ in range(5):
        train(both, part(), steps=1)
    both.calls = 0

    def fail(*args):
        if both.calls == 5:
            raise ArithmeticError("F has failed")

    if dist.get_rank() == 1:
        both.inner[0].register_forward_hook(fail)
    train(both, part(), steps=1)


def dying(at, is_killed=False):
    """One process ends: F raises before it communicates, or the process is killed after it."""
    both = sharded(Net("ift(tol=1e-10)"))
    train(both, part(), steps=1)
    both.is_killed = is_killed
    both.calls, both.fails_at = 0, at if dist.get_rank() == 1 else None
    train(both, part(), steps=1)


def not_finite():
    """A NaN in one process under guard: is the gradient finite, failures, evaluations."""
    spec = "guard('ift', on_failure=\"fallback('upg(k=2)')\")"
    both = sharded(Net(spec, max_iter=20, batch_dim=0))
    x, y = data(0)
    x, y = x[part()].clone(), y[part()]
    if dist.get_rank() == 1:
        both.start = torch.zeros(len(x), WIDTH, dtype=torch.float64)
        both.start[0] = torch.nan
    (both(x) - y).square().mean().backward()
    finite = all(bool(whole(p.grad).isfinite().all()) for p in both.inner.parameters())
    failures = everywhere(sum(dpp.failures(both).values()))
    return {"finite": finite, "failures": failures, "calls": everywhere(both.calls)}


def auto():
    """What processes choose."""
    both = sharded(Net("auto(every=2)"))
    train(both, part(), steps=4)
    chosen = everywhere([(r.step, r.spec) for r in dpp.report_choice(both)])
    return {"chosen": chosen, "calls": everywhere(both.calls)}


def measured():
    """Spectral radii of own samples, found in lockstep."""
    model = Net()
    both = sharded(copy.deepcopy(model), ("inner",))
    u = model.inject(data(0)[0]).detach()
    h = own(functools.partial(model.func, u), torch.zeros_like(u)).detach()
    got, want = (
        dpp.spectral_radius(functools.partial(net.func, v), g, batch_dim=0, tol=1e-8)
        for net, v, g in ((both, u[part()], h[part()]), (model, u, h))
    )
    return {"error": float((got - want[part()]).abs().max())}


def tensor_parallel():
    """Weights split over pairs of processes, one state that all of them hold."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    model = Net("ift(tol=1e-10)")
    model.inner = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, WIDTH)).double()
    with torch.no_grad():
        for p in model.inner.parameters():
            p.mul_(0.8)
    both = copy.deepcopy(model)
    shape, names = (dist.get_world_size() // 2, 2), ("data", "tensor")
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)["tensor"]
    parallelize_module(both.inner, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    error = distance(train(both, slice(None)), train(model, slice(None)))
    return {"error": error, "calls": everywhere(both.calls)}


def sharded_state(grad, solver="fixed_point", dim=1, nested=False):
    """A state that is split over processes along its sequence, which F mixes, or its batch.

    Without modules, so that nothing but the state says that F communicates.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, ends = init_device_mesh("cpu", (dist.get_world_size(),)), []
    for splits in (True, False):
        torch.manual_seed(0)

        def made(*shape, splits=splits, at=None):
            t = torch.randn(*shape, dtype=torch.float64)
            return distribute_tensor(t, mesh, [at or Replicate()]) if splits else t

        u, w, mixes = made(4, 8, 6, at=Shard(dim)), made(6, 6), made(8, 8)
        w, mixes = (0.25 * m.detach() for m in (w, mixes))
        parameters = [w.requires_grad_(), mixes.requires_grad_()]
        calls = [0]

        def func(h, u=u, w=w, mixes=mixes, splits=splits, calls=calls):
            calls[0] += 1
            x = h[0] if nested else h
            image = torch.tanh(torch.einsum("st,btd->bsd", mixes, x) @ w + u)
            image = image.redistribute(mesh, [Shard(dim)]) if splits else image
            if not nested:
                return image
            mean = image.mean(1)  # small, and the same in all processes
            mean = mean.redistribute(mesh, [Replicate()]).to_local() if splits else mean
            return [image, 0.5 * mean + 0.3 * h[1]]

        start = torch.zeros_like(u)
        start = [start, torch.zeros(4, 6, dtype=torch.float64)] if nested else start
        equilibrium = dpp.Equilibrium(solver, grad, tol=1e-10, max_iter=200, batch_dim=0)
        torch.manual_seed(dist.get_rank() if splits else 0)
        found = equilibrium(func, start)
        leaves = found if nested else [found]
        sum(whole(leaf).square().sum() for leaf in leaves).backward()
        numbers = [leaf.detach() for leaf in leaves] + [p.grad for p in parameters]
        ends.append(([whole(t) for t in numbers], calls[0]))
    (got, n_calls), (want, _) = ends
    return {"error": distance(got, want), "calls": everywhere(n_calls)}


def apart():
    """F that does not communicate: each process evaluates it as often as it has to."""
    model = Net("ift(tol=1e-10)")
    train(model, part(), steps=1)
    return {"calls": everywhere(model.calls)}


def cases():
    found = {f"{spec} | fixed_point": functools.partial(compared, grad=spec) for spec in SPECS}
    for solver, options in SOLVERS.items():
        for spec in ("upg", "ift(tol=1e-10)"):
            found[f"{spec} | {solver}"] = functools.partial(compared, grad=spec, **options)
    found["shine | broyden"] = functools.partial(
        compared, grad="shine(refine=12)", **SOLVERS["broyden"]
    )
    found["checkpointed"] = functools.partial(compared, grad="ift(tol=1e-10)", checkpointed=True)
    for core in ("sliced", "indexing"):
        for solver in HOSTED if core == "sliced" else HOSTED[1::2]:
            options = {"core": core, "solver": solver}
            found[f"{core} | {solver}"] = functools.partial(
                compared, grad="ift(tol=1e-10)", **options
            )
    for spec in SPLIT:
        found[f"split | {spec}"] = functools.partial(sharded_state, spec)
    for solver in ("anderson", "broyden"):
        found[f"split | {solver}"] = functools.partial(sharded_state, "ift(tol=1e-10)", solver)
    twice = "ift(tol=1e-10, higher_order=True)"
    found["split | refused"] = functools.partial(sharded_state, twice)
    found["split | shine"] = functools.partial(sharded_state, "shine(refine=15)", "broyden")
    found["split | batch"] = functools.partial(sharded_state, "ift(tol=1e-10)", dim=0)
    found["split | nested"] = functools.partial(sharded_state, "ift(tol=1e-10)", nested=True)
    told = {"collective": True, "process_group": dist.group.WORLD}
    found |= {
        "F alone": inner_alone,
        "told": functools.partial(told_group, **told),
        "no_grad": functools.partial(evaluated, torch.no_grad),
        "inference_mode": functools.partial(evaluated, torch.inference_mode),
        "without samples": functools.partial(without, "samples"),
        "without gradient": functools.partial(without, "gradient"),
        "without solve": functools.partial(without, "solve"),
        "not finite": not_finite,
        "auto": auto,
        "spectral_radius": measured,
        "tensor parallel": tensor_parallel,
        "apart": apart,
        "alike": functools.partial(alike, shrinks=False),
        "shorter at last": functools.partial(alike, shrinks=True),
        "fails in what was agreed": functools.partial(failing, 5, before=5),
        "fails in the solve": functools.partial(failing, 5),
        "fails at first": functools.partial(failing, 1),
        "fails where it stands in": functools.partial(failing, 30, rank=0),
        "fails in strategy": functools.partial(failing, 4, "bptt(steps=6)", 0),
    }
    return found


def told_group(**options):
    """F communicates by a collective of its own, which nobody sees."""
    model = Net("ift(tol=1e-10)", **options)
    train(model, part(), steps=1)
    return {"calls": everywhere(model.calls)}


def guarded(function):
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main():
    with together(SECONDS):
        dpp.enable("torchdeq")
        names, known = sys.argv[2:], cases()
        if names == ["raises"]:
            dying(-5)
        if names == ["raises within"]:
            dying_within()
        if names == ["is killed"]:
            dying(5, is_killed=True)
        found = {}
        for name in names or known:
            start = time.perf_counter()
            found[name] = guarded(known[name])
            if dist.get_rank() == 0:
                print(name, found[name], f"{time.perf_counter() - start:.1f} s", flush=True)
        write(found)


if __name__ == "__main__":
    main()
