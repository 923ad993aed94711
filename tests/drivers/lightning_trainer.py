"""Trains with Lightning in two processes, and writes how far that is from a loop in one.

torchrun --standalone --nproc-per-node 2 lightning_trainer.py OUT.json
"""

import datetime
import logging
import tempfile
from pathlib import Path

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import deq_phantom_plugin as dpp
from deq_phantom_plugin.integrations.lightning import SetStep
from in_processes import everywhere, together, write

WORLD, BATCH, STEPS, RATE = 2, 8, 6, 0.2  # two epochs
SCHEDULE = "schedule({0: 'jfb', 0.5: 'npg'})"
SPECS = (
    "ift(tol=1e-12, max_iter=100)",
    "ift(tol=1e-12, max_iter=100, warm_start=True)",
    "npg",
    SCHEDULE,
    "upg(k=3, checkpoint=True)",
)
TIMEOUT = datetime.timedelta(seconds=30)


class Net(nn.Module):
    """An equilibrium between two linear layers."""

    def __init__(self, grad):
        super().__init__()
        torch.manual_seed(0)
        self.inject, self.inner, self.out = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 1)
        nn.init.orthogonal_(self.inner.weight, 0.5)
        self.deq = dpp.Equilibrium(grad=grad, tol=1e-13, max_iter=100)
        self.double()

    def forward(self, x):
        u = self.inject(x)
        return self.out(self.deq(lambda h: torch.tanh(self.inner(h) + u), torch.zeros_like(u)))


def rows():
    generator = torch.Generator().manual_seed(1)
    shapes = (BATCH * STEPS // 2, 3), (BATCH * STEPS // 2, 1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def loss_of(net, x, y):
    return (net(x) - y).square().mean()


class Lit(lightning.LightningModule):
    """The same in Lightning; every process sees its rows of each joint batch.

    `sharded` is False, True, or "F apart" with F in a group of its own.
    """

    def __init__(self, grad, accumulate=1, sharded=False):
        super().__init__()
        self.net, self.size, self.sharded = Net(grad), BATCH // WORLD // accumulate, sharded
        self.told = []

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"] if self.sharded else None
        if self.sharded == "F apart":
            fully_shard(self.net.inner, mesh=mesh)
        if self.sharded:
            fully_shard(self.net, mesh=mesh)
            self.sharded = False

    def training_step(self, batch, index):
        self.told.append([self.net.deq.memory.step, self.net.deq.memory.total])
        return loss_of(self.net, *batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), RATE, momentum=0.9)

    def train_dataloader(self):
        data = torch.utils.data.TensorDataset(*rows())
        sampler = torch.utils.data.DistributedSampler(data, shuffle=False)
        return torch.utils.data.DataLoader(data, self.size, sampler=sampler)


class Log(Logger):
    """Counts what it is told of equilibria."""

    name, version = "log", 0

    def __init__(self):
        super().__init__()
        self.steps = []

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        if any("spectral_radius" in name for name in metrics):
            self.steps.append(step)


def trainer(*callbacks, strategy=None, **settings):
    ddp = DDPStrategy(process_group_backend="gloo", timeout=TIMEOUT)
    settings = {"max_epochs": 2, "callbacks": [SetStep(), *callbacks], "logger": False, **settings}
    return lightning.Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy=strategy or ddp,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        **settings,
    )


def by_hand(grad):
    """Train in one process on the joint batches."""
    net = Net(grad)
    optimizer = torch.optim.SGD(net.parameters(), RATE, momentum=0.9)
    batches = list(zip(*(part.split(BATCH) for part in rows()), strict=True))
    for step, (x, y) in enumerate(2 * batches):
        dpp.set_step(net, step, total=STEPS)
        optimizer.zero_grad()
        loss_of(net, x, y).backward()
        optimizer.step()
    return net


def distance(net, wanted):
    """The largest error of a parameter, of the way that it went."""
    errors, begin = [], Net("jfb")
    triples = zip(net.parameters(), wanted.parameters(), begin.parameters(), strict=True)
    for p, q, b in triples:
        p = p.full_tensor() if isinstance(p, DTensor) else p
        errors.append(float((p - q).norm() / (q - b).norm()))
    return max(errors)


def data_parallel(grad, accumulate):
    model = Lit(grad, accumulate)
    trainer(accumulate_grad_batches=accumulate).fit(model)
    return {"apart": distance(model.net, by_hand(grad)), "told": model.told}


def model_parallel():
    # By default Lightning takes the processes of one machine for parts of tensors.
    return ModelParallelStrategy(
        data_parallel_size=WORLD,
        tensor_parallel_size=1,
        timeout=TIMEOUT,
        process_group_backend="gloo",
    )


def sharded(grad, how=True):
    model = Lit(grad, sharded=how)
    trainer(strategy=model_parallel()).fit(model)
    inside = all(isinstance(p, DTensor) for p in model.net.parameters())
    return {"apart": distance(model.net, by_hand(grad)), "told": model.told, "sharded": inside}


def resumed(grad, folder, shard=False):
    """A run that ended after its first epoch, and was taken up by other objects."""
    path = folder / f"{SPECS.index(grad)}{shard}.ckpt"
    first, second = Lit(grad, sharded=shard), Lit(grad, sharded=shard)
    for model, epochs in ((first, 1), (second, 2)):
        fitted = trainer(
            callbacks=[SetStep(total=STEPS)],
            max_epochs=epochs,
            strategy=model_parallel() if shard else None,
        )
        fitted.fit(model, ckpt_path=path if model is second else None)
        if model is first:
            fitted.save_checkpoint(path)
    return {"apart": distance(second.net, by_hand(grad)), "told": first.told + second.told}


def monitored():
    log, model = Log(), Lit("npg")
    trainer(callbacks=[SetStep(monitor=2)], logger=log).fit(model)
    return {"apart": distance(model.net, by_hand("npg")), "logged": log.steps}


def main():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with together(TIMEOUT.seconds):
        shared = [tempfile.mkdtemp()]
        dist.broadcast_object_list(shared)
        folder, found = Path(shared[0]), {}
        for grad in SPECS:
            for accumulate in (1, 2):
                found[f"ddp | {grad} | {accumulate}"] = data_parallel(grad, accumulate)
            found[f"sharded | {grad}"] = sharded(grad)
            found[f"F apart | {grad}"] = sharded(grad, "F apart")
            found[f"resumed | {grad}"] = resumed(grad, folder)
            found[f"resumed, sharded | {grad}"] = resumed(grad, folder, shard=True)
        found["monitored"] = monitored()
        write(everywhere(found))


if __name__ == "__main__":
    main()
