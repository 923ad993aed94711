"""An MDEQ that learns to classify images."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import deq_phantom_plugin as dpp
from deq_phantom_plugin.adapters.mdeq import MDEQ

from . import peers, processes
from .images import load_images
from .reports import is_due, reported
from .schedule import after_pretraining, cosine
from .training import Task


@dataclass(frozen=True)
class VisionSettings:
    """How an MDEQ is trained.

    Attributes:
        dataset: "cifar10", "digits", "folder" or "generated".
        train_images: the first of them; 0 for all.
        test_images: the same.
        image_size: side in pixels.
        augment: whether training images are cropped and flipped at random.
        preset: of `MDEQ.from_preset`.
        dropout: of the residual blocks.
        grad: the gradient: a spec, or TorchDEQ's own number of steps.
        lam: TorchDEQ's `tau`, for its own methods.
        implicit: whether TorchDEQ's own implicit differentiation is used, in place of `grad`.
        layer: who solves and attaches: "torchdeq", with this package in it, or another library's
            layer, see `peers.LAYERS`, for which `grad`, `lam` and `f_solver` mean nothing.
        compile: whether f is compiled.
        solve_dtype: of most of the forward solve, such as "bfloat16"; "" for the model's.
        warm_start: whether solves in training begin at the last equilibria of the same images. A
            run that is resumed begins an epoch cold, and its numbers differ by that.
        pretrain_steps: steps in which backpropagation goes through a few evaluations of f.
        pretrain_layers: how many.
        f_solver: forward solver.
        f_max_iter: its most evaluations of f; 0 for the preset's.
        eval_f_max_iter: those in evaluation; 0 for the same.
        f_tol: relative residual at which a solve stops; 0 for the published one.
        epochs: passes over the training images.
        batch_size: images a step, of all processes together.
        optimizer: "adam" or "sgd".
        lr: largest learning rate.
        anneal: whether it falls to 1e-6 along half a cosine.
        momentum: of SGD.
        nesterov: SGD's kind of momentum.
        weight_decay: of either.
        eval_epochs: epochs between measurements of accuracy.
        eval_every: steps between them, in place of `eval_epochs` and `radius_every`; 0 for those.
        eval_batch: images of an evaluation's batch.
        eval_steps: accuracy is also measured with that many damped steps after the solve.
        eval_lam: their damping.
        radius_images: test images whose spectral radii are measured; 0 for none.
        radius_lam: damping of the damped map's radius.
        radius_every: steps between measurements of the radii; 0 for those of accuracy alone.
        report_grads: gradients whose cosines are measured, see `dpp.model_report`; none for none.
        report_images: test images that they are measured on.
        report_every: steps between these measurements, as many as between evaluations or a
            multiple of that.
        same_time_as: a run whose time this one takes, in as many steps as that allows.
    """

    dataset: str
    train_images: int
    test_images: int
    image_size: int
    augment: bool
    preset: str
    dropout: float
    grad: str | int
    pretrain_steps: int
    pretrain_layers: int
    f_solver: str
    epochs: int
    batch_size: int
    optimizer: str
    lr: float
    weight_decay: float
    eval_epochs: int
    radius_images: int
    radius_lam: float
    radius_every: int = 0
    lam: float = 1.0
    implicit: bool = False
    layer: str = "torchdeq"
    compile: bool = False
    solve_dtype: str = ""
    warm_start: bool = False
    f_max_iter: int = 0
    eval_f_max_iter: int = 0
    f_tol: float = 0.0
    momentum: float = 0.9
    nesterov: bool = False
    eval_every: int = 0
    eval_batch: int = 250
    eval_steps: tuple[int, ...] = ()
    eval_lam: float = 0.5
    report_grads: tuple[str, ...] = ()
    report_images: int = 16
    report_every: int = 0
    same_time_as: str = ""
    anneal: bool = True


class VisionTask(Task):
    """Trains an MDEQ; see `Task`.

    Args:
        settings: how.
        seed: of the weights, the order of the images, dropout and augmentation.
        data: where the images lie.
        device: where to train.
    """

    def __init__(
        self, settings: VisionSettings, seed: int, data: Path | None, device: torch.device
    ) -> None:
        self.settings, self.seed, self.device = settings, seed, device
        s = settings
        if any(not isinstance(k, int) or k < 1 for k in s.eval_steps):
            raise ValueError(f"eval_steps={list(s.eval_steps)}; expected whole numbers above 0")
        self.train_set, self.test_set = load_images(
            s.dataset, data, s.train_images, s.test_images, s.image_size
        )
        if len(self.train_set.labels) < s.batch_size:
            raise SystemExit(
                f"{len(self.train_set.labels)} training images; expected at least a batch of "
                f"{s.batch_size}"
            )
        processes.share(torch.arange(s.batch_size))  # refused here and not in the first step
        self.epoch_steps = len(self.train_set.labels) // s.batch_size
        self.steps = s.epochs * self.epoch_steps
        self._accuracy_every = self.eval_every = s.eval_epochs * self.epoch_steps
        if s.radius_images and s.radius_every:
            self.eval_every = min(self._accuracy_every, s.radius_every)
        if s.eval_every:
            self._accuracy_every = self.eval_every = s.eval_every
        torch.manual_seed(seed)
        deq: dict[str, Any] = {"f_solver": s.f_solver}
        for name in ("f_max_iter", "eval_f_max_iter", "f_tol"):
            deq |= {name: getattr(s, name)} if getattr(s, name) else {}
        deq |= {"ift": True, "b_solver": "broyden", "b_max_iter": 24} if s.implicit else {}
        deq |= {"tau": s.lam} if isinstance(s.grad, int) else {}
        deq |= {"solve_dtype": s.solve_dtype} if s.solve_dtype else {}
        model = MDEQ.from_preset(
            s.preset,
            num_classes=self.train_set.classes,
            grad=after_pretraining(s.grad, s.pretrain_steps, s.pretrain_layers, self.steps),
            dropout=s.dropout,
            compile=s.compile,
            warm_start="sample" if s.warm_start else None,
            **deq,
        )
        if s.layer != "torchdeq" and s.report_grads:
            raise ValueError(f"report_grads beside layer={s.layer!r}; expected layer='torchdeq'")
        if s.layer != "torchdeq":
            model.deq = peers.layer(s.layer, s.f_max_iter or model.config.f_max_iter, model.layer)
        self.model = model.to(device, memory_format=torch.channels_last)
        self.parallel = processes.parallel(self.model)
        self.optimizer = _optimizer(self.model, s)
        self._reader = ThreadPoolExecutor(1)
        self._next: tuple[int, Future[tuple[Tensor, Tensor, Tensor]]] | None = None

    def step(self, number: int) -> Tensor:
        """Take a step."""
        images, labels, indices = self._batch(number)
        torch.manual_seed(processes.seed(self.seed, number))
        if self.settings.layer == "torchdeq":
            dpp.set_step(self.model, number)
        if self.settings.anneal:
            for group in self.optimizer.param_groups:
                group["lr"] = cosine(number, self.steps, self.settings.lr, lowest=1e-6)
        self.model.train()
        self.optimizer.zero_grad()
        told = {"samples": indices} if self.settings.warm_start else {}
        loss = F.cross_entropy(self.parallel(images, **told), labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def evaluate(self, step: int) -> dict[str, float]:
        """Return the spectral radii and, once an epoch's end is reached, accuracy and loss.

        All are measured on test images.

        `accuracy` is that of the states that the solver returns, `residual` theirs; `accuracy_K` is
        that of the states K damped steps on. `rho` is the mean spectral radius of df/dh, `rho_max`
        the largest one, and `rho_damped` the mean of that of the damped map.
        """
        s = self.settings
        self.model.eval()
        found: dict[str, float] = {}
        reached, before = (n // self._accuracy_every for n in (step, step - self.eval_every))
        if step > 0 and (reached > before or step == self.steps):
            found = self._accuracy(0)
            for k in s.eval_steps:
                found[f"accuracy_{k}"] = self._accuracy(k)["accuracy"]
        if s.radius_images:
            indices = torch.arange(min(s.radius_images, len(self.test_set.labels)))
            with torch.no_grad():
                self.model(self._to_device(self.test_set.batch(indices)))
            options = {"tol": 0.02, "max_iter": 60}
            radii = self.model.spectral_radius(**options)
            damped = self.model.spectral_radius(s.radius_lam, **options)
            found |= {"rho": float(radii.mean()), "rho_max": float(radii.max())}
            found["rho_damped"] = float(damped.mean())
        if s.report_grads and is_due(step, s.report_every or self.eval_every, self.steps):
            found |= self._report()
        return found

    def _report(self) -> dict[str, float]:
        """Return what a report on test images says, see `reported`."""
        s = self.settings
        indices = torch.arange(min(s.report_images, len(self.test_set.labels)))
        labels = self.test_set.labels[indices].to(self.device)
        # Numbers that no training image has, so that these begin cold.
        told = {"samples": indices + len(self.train_set.labels)} if s.warm_start else {}
        return reported(
            self.model,
            str(s.grad),
            {"x": self._to_device(self.test_set.batch(indices)), **told},
            lambda logits: F.cross_entropy(logits, labels),
            s.report_grads,
        )

    @torch.no_grad()
    def _accuracy(self, extra: int) -> dict[str, float]:
        count = len(self.test_set.labels)
        mine = torch.arange(processes.rank(), count, processes.count())
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.model.eval_steps, self.model.eval_lam = extra, self.settings.eval_lam
        try:
            for indices in mine.split(self.settings.eval_batch):
                images = self._to_device(self.test_set.batch(indices))
                labels = self.test_set.labels[indices].to(self.device)
                logits = self.model(images)
                sums[0] += (logits.argmax(dim=1) == labels).sum()
                sums[1] += F.cross_entropy(logits, labels, reduction="sum")
                sums[2] += self.model.last.residual.sum()
        finally:
            self.model.eval_steps = 0
        right, loss, residual = (processes.total(sums) / count).tolist()
        return {"accuracy": right, "loss": loss, "residual": residual}

    def _batch(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return a step's images, labels and indices, and begin to read those of the next one."""
        if self._next is not None and self._next[0] == number:
            images, labels, indices = self._next[1].result()
        else:
            images, labels, indices = self._read(number)
        self._next = (number + 1, self._reader.submit(self._read, number + 1))
        return self._to_device(images), labels.to(self.device), indices

    def _read(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        epoch, place = divmod(number, self.epoch_steps)
        order = processes.epoch_order(self.seed, epoch, len(self.train_set.labels))
        size = self.settings.batch_size
        indices = processes.share(order[place * size : (place + 1) * size])
        generator = torch.Generator().manual_seed(processes.seed(self.seed, number))
        images = self.train_set.batch(indices, generator if self.settings.augment else None)
        return images, self.train_set.labels[indices], indices

    def _to_device(self, images: Tensor) -> Tensor:
        return images.to(self.device).contiguous(memory_format=torch.channels_last)


def _optimizer(model: torch.nn.Module, s: VisionSettings) -> torch.optim.Optimizer:
    if s.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), s.lr, weight_decay=s.weight_decay)
    if s.optimizer == "sgd":
        return torch.optim.SGD(
            model.parameters(), s.lr, s.momentum, weight_decay=s.weight_decay, nesterov=s.nesterov
        )
    raise ValueError(f"optimizer={s.optimizer!r}; expected adam or sgd")
