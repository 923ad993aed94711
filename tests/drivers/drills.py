"""Trains while processes are killed, each attempt by another fault, and writes what each step was.

torchrun --nproc-per-node 2 --max-restarts 6 drills.py FOLDER FAULT ...

The first attempt meets the first fault, and so on; the one after the last trains to the end, and
then once more from the beginning, undisturbed, to be compared with. Every step is a line in
FOLDER/rank_R.jsonl.
"""

import io
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchdeq import get_deq

import deq_phantom_plugin as dpp

sys.path.append(str(Path(__file__).parents[2] / "examples"))

from train_ddp import Checkpoints

from in_processes import together

STEPS, SAVE_EVERY, MORE, WIDTH, ROWS = 24, 4, 3, 8, 4
AUTO = "auto(cosine=0.9, every=5)"
# Stopped far above rounding and begun where the last step ended, so that a run which has lost what
# memories keep is another one.
GRAD = f"schedule({{0: {AUTO!r}, 12: 'ift(tol=0.1, warm_start=True)'}})"
# The step of each fault, counted from 0. A checkpoint is saved after each fourth step.
FAULTS = {
    "killed in a forward solve": 6,
    "killed in an adjoint solve": 9,
    "killed while saving weights": 11,
    "killed while saving a memory": 11,
    "terminated in the middle of a step": 14,
    "a checkpoint cut short": 18,
    "the launcher terminated": 21,
}


class Net(nn.Module):
    """Two equilibria, one of this package and one of TorchDEQ, between linear layers."""

    def __init__(self, grad=GRAD):
        super().__init__()
        torch.manual_seed(0)
        self.inject, self.out = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 2)
        self.inner = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        for layer in self.inner:
            nn.init.orthogonal_(layer.weight, 0.8)
        self.equilibrium = dpp.Equilibrium("fixed_point", grad, tol=1e-6, max_iter=200, batch_dim=0)
        self.deq = get_deq(grad=grad, f_solver="fixed_point_iter", f_max_iter=200, f_tol=1e-6)
        self.fault = lambda where: None
        self.double()

    def func(self, index, x):
        def func(h):
            self.fault("forward")
            image = torch.tanh(self.inner[index](h) + x)
            if image.requires_grad:
                image.register_hook(lambda grad: self.fault("adjoint"))
            return image

        return func

    def forward(self, x):
        x = self.inject(x)
        h = self.equilibrium(self.func(0, x), torch.zeros_like(x))
        return self.out(self.deq(self.func(1, h), torch.zeros_like(x))[0][-1])


def struck(name):
    """Return the rank of the process that a fault ends.

    In turn the first one, which writes what all share and hosts the store, and another.
    """
    return 0 if name in ("killed in an adjoint solve", "killed while saving weights") else 1


class Fault:
    """Ends this process, or its launcher, at one place of one step.

    Args:
        name: of `FAULTS`, or None.
        folder: of the checkpoints.
    """

    def __init__(self, name, folder):
        self.name, self.folder, self.step, self.calls = name, folder, -1, 0
        self.here = name is not None and dist.get_rank() == struck(name)
        self.at = FAULTS.get(name)

    def begin(self, step):
        self.step, self.calls = step, 0

    def __call__(self, where):
        """Be told of an evaluation of F, or of a product with its Jacobian."""
        if not (self.here and self.step == self.at):
            return
        places = {"killed in a forward solve": ("forward", 5)}
        place, number = places.get(self.name, ("adjoint", 3))
        self.calls += where == place
        if self.calls != number:
            return
        if self.name == "the launcher terminated":
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(60)  # it ends this process before
        elif self.name == "terminated in the middle of a step":
            os.kill(os.getpid(), signal.SIGTERM)
        elif self.name == "a checkpoint cut short":
            latest = self.folder / f"step_{Checkpoints(self.folder).steps()[0]:08d}"
            file = latest / f"own_{dist.get_rank()}.pt"
            os.truncate(file, file.stat().st_size * 2 // 3)
            os.kill(os.getpid(), signal.SIGKILL)
        elif not self.name.startswith("killed while saving"):
            os.kill(os.getpid(), signal.SIGKILL)

    def save(self, state, file):
        """Save half of a state, and be killed."""
        whole = io.BytesIO()
        save(state, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    def saving(self):
        """Break what is saved from now on."""
        if self.here and self.step == self.at and self.name.startswith("killed while saving"):
            torch.save = self.save


save = torch.save


def data():
    """The batch of this process, the same in each step, as warm starts want it."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(ROWS, 4, generator=generator, dtype=torch.float64)
    return x, torch.randn(ROWS, 2, generator=generator, dtype=torch.float64)


class Training:
    """A model, its average over the steps and its optimiser, from the latest checkpoint if any.

    Args:
        folder: of the checkpoints.
        fault: what happens to it.
        forgets: whether what memories keep is left out when it resumes.
    """

    def __init__(self, folder, fault=None, forgets=False):
        self.checkpoints, self.fault = Checkpoints(folder), Fault(fault, folder)
        self.model = Net()
        self.model.fault = self.fault
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.optimizer = torch.optim.Adam(self.model.parameters(), 3e-2)
        self.step, found = 0, self.checkpoints.load(torch.device("cpu"))
        if found is not None:
            shared, own = found
            self.step = shared["step"]
            for name in ("model", "average", "optimizer"):
                getattr(self, name).load_state_dict(shared[name])
            dpp.load_memory_state_dict(self.model, {} if forgets else own["memory"])
        self.wrapped = DistributedDataParallel(self.model)

    def until(self, last):
        """Train, and yield what each step was."""
        x, y = data()
        logged = {}
        with dpp.monitor(self.model, lambda numbers, step: logged.update(numbers), every=3):
            while self.step < last:
                logged.clear()
                yield self.one_step(x, y) | {"monitor": dict(sorted(logged.items()))}

    def one_step(self, x, y):
        self.fault.begin(self.step)
        dpp.set_step(self.wrapped, self.step, total=STEPS)
        self.optimizer.zero_grad()
        loss = (self.wrapped(x) - y).square().mean()
        loss.backward()
        self.optimizer.step()
        self.average.update_parameters(self.model)
        self.step += 1
        if self.step % SAVE_EVERY == 0:
            self.fault.saving()
            names = ("model", "average", "optimizer")
            shared = {name: getattr(self, name).state_dict() for name in names}
            self.checkpoints.save(self.step, shared, {"memory": dpp.memory_state_dict(self.model)})
        with torch.no_grad():
            averaged = self.average.eval()(x)
        return {
            "step": self.step - 1,
            "loss": loss.item(),
            "average": averaged.square().mean().item(),
            "chosen": [record.spec for record in dpp.report_choice(self.model)],
        }


def main():
    folder, faults = Path(sys.argv[1]), sys.argv[2:]
    dpp.enable("torchdeq")
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    fault = faults[attempt] if attempt < len(faults) else None
    with together(), open(folder / f"rank_{dist.get_rank()}.jsonl", "a") as log:

        def note(of, records):
            for record in records:
                log.write(json.dumps({"of": of, **record}) + "\n")
                log.flush()

        note(fault or "the last", Training(folder / "checkpoints", fault).until(STEPS))
        undisturbed = Training(folder / "undisturbed")
        note("undisturbed", undisturbed.until(STEPS))
        # What memories keep is good for something: without it the training goes on otherwise.
        note("undisturbed", undisturbed.until(STEPS + MORE))
        forgetful = Training(folder / "undisturbed", forgets=True)
        note("forgetful", forgetful.until(STEPS + MORE))


if __name__ == "__main__":
    main()
