"""What processes see of one that is killed, stops, raises or computes NaN, without a launcher.

python peers.py PROCESSES OUT.json

Each case has processes of its own, forked from this one, that train a small model together. The
second of them is the one in which it happens.
"""

import datetime
import json
import os
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import deq_phantom_plugin as dpp

STEPS, AT, ROWS, WIDTH, VICTIM = 6, 3, 3, 8, 1
TIMEOUT = 15  # seconds, of the group
GUARD = "guard({!r}, on_failure={!r})"
FALLBACK = "fallback('jfb')"
# With one method, for the choice of several is by the mean of the processes' quantiles, which one
# process on the joint batch does not have.
AUTO = f"auto(every={AT}, methods=['npg(k=3)'])"
# The gradient; where it happens, in an evaluation, a product or the result of the solve; and what.
CASES = {
    "killed in a forward solve": ("ift", "evaluation", signal.SIGKILL),
    "killed in an adjoint solve": ("ift", "product", signal.SIGKILL),
    "killed where auto measures": (AUTO, "product", signal.SIGKILL),
    "stopped": ("ift", "evaluation", signal.SIGSTOP),
    "raises": ("ift", "evaluation", None),
    "raises in backward": ("ift", "product", None),
    "NaN": ("ift", "result", slice(0, 1)),
    "NaN, guard raises": (GUARD.format("ift", "raise"), "result", slice(0, 1)),
    "NaN, guard warns": (GUARD.format("ift", "warn"), "result", slice(0, 1)),
    "NaN, guard falls back": (GUARD.format("ift", FALLBACK), "result", slice(0, 1)),
    "NaN in all, guard falls back": (GUARD.format("ift", FALLBACK), "result", slice(None)),
    "NaN, guard of auto": (GUARD.format(AUTO, FALLBACK), "result", slice(0, 1)),
    "NaN in all, guard of auto": (GUARD.format(AUTO, FALLBACK), "result", slice(None)),
}
GOES_ON = [name for name in CASES if "falls back" in name or "of auto" in name]


class Net(nn.Module):
    """An equilibrium between linear layers, solved by a loop of its own."""

    def __init__(self, grad):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        nn.init.orthogonal_(self.inner.weight, 0.7)
        self.equilibrium = dpp.Equilibrium(self.solve, grad, batch_dim=0)
        self.rows = None  # of the result that are NaN
        self.happens = lambda where: None
        self.double()

    def solve(self, func, h):
        for _ in range(100):
            h = func(h)
        if self.rows is not None:
            h[self.rows] = torch.nan
        return h

    def forward(self, x):
        def func(h):
            self.happens("evaluation")
            image = torch.tanh(self.inner(h) + x)
            if image.requires_grad:
                image.register_hook(lambda grad: self.happens("product"))
            return image

        return self.out(self.equilibrium(func, torch.zeros_like(x)))


def data(step, processes):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(processes * ROWS, WIDTH, generator=generator, dtype=torch.float64)


def train(wrapped, model, step, x):
    """One step; returns what the gradients were."""
    dpp.set_step(model, step)
    model.zero_grad()
    wrapped(x).square().mean().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    with torch.no_grad():
        for p, grad in zip(model.parameters(), grads, strict=True):
            p -= 0.1 * grad
    return grads


def take_part(rank, processes, case, folder):
    """Train as one of the processes, and return how that ended."""
    grad, where, what = CASES[case]
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=processes,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    model = Net(grad)
    wrapped = DistributedDataParallel(model)
    begun = folder / "begun"

    def happens(place):
        if place == where and step == AT and rank == VICTIM and not begun.exists():
            begun.write_text(str(time.time()))
            if what is None:
                raise ZeroDivisionError
            os.kill(os.getpid(), what)

    model.happens = happens
    own = slice(rank * ROWS, (rank + 1) * ROWS)
    for step in range(STEPS):
        if where == "result" and step == AT and rank == VICTIM:
            begun.write_text(str(time.time()))
            model.rows = what
        train(wrapped, model, step, data(step, processes)[own])
        model.rows = None
    return [p.tolist() for p in model.parameters()], model


def child(rank, processes, case, folder):
    """Be one of the processes, to its end."""
    found, begun = {}, folder / "begun"
    signal.alarm(20 * TIMEOUT)  # a hang beyond what the group allows would be ours
    try:
        found["parameters"], model = take_part(rank, processes, case, folder)
        found["failures"] = dpp.failures(model)
        found["chosen"] = [record.spec for record in dpp.report_choice(model)]
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    if begun.exists():
        found["seconds"] = time.time() - float(begun.read_text())
    (folder / f"{rank}.json").write_text(json.dumps(found))
    os._exit("error" in found)  # as an error would end it


def run(case, processes):
    """Return how a case ended for each process, None for one that could not say."""
    with tempfile.TemporaryDirectory() as name:
        folder, pids = Path(name), []
        for rank in range(processes):
            pid = os.fork()
            if pid == 0:
                child(rank, processes, case, folder)
            pids.append(pid)
        for rank, pid in enumerate(pids):
            if rank != VICTIM:
                os.waitpid(pid, 0)
        if case == "stopped":
            os.kill(pids[VICTIM], signal.SIGKILL)
        os.waitpid(pids[VICTIM], 0)
        files = [folder / f"{rank}.json" for rank in range(processes)]
        return [json.loads(f.read_text()) if f.exists() else None for f in files]


def alone(case, processes):
    """The parameters of one process that trains on the joint batch, with the same NaN."""
    grad, _, what = CASES[case]
    model = Net(grad)
    for step in range(STEPS):
        if step == AT:
            model.rows = range(processes * ROWS)[VICTIM * ROWS : (VICTIM + 1) * ROWS][what]
        train(model, model, step, data(step, processes))
        model.rows = None
    return [p.tolist() for p in model.parameters()]


def main():
    out, processes = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    names = sys.argv[3:] or CASES
    found = {case: run(case, processes) for case in names}
    joint = {case: alone(case, processes) for case in names if case in GOES_ON}
    out.write_text(json.dumps({"found": found, "joint": joint}))


if __name__ == "__main__":
    main()
