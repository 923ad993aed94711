"""Trains an MDEQ that classifies images."""

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
from .reports import is_due, report_interval, reported
from .schedule import after_pretraining, cosine
from .training import Task


@dataclass(frozen=True)
class VisionSettings:
    """The settings of a training run of an MDEQ.

    Attributes:
        dataset: "cifar10", "digits", "folder" or "generated".
        train_images: the number of training images, which are the first ones; 0 for all.
        test_images: the number of test images, which are the first ones; 0 for all.
        image_size: the side of an image in pixels.
        augment: whether training images are cropped and flipped at random.
        preset: the name of a preset of `MDEQ.from_preset`.
        dropout: the dropout of the residual blocks.
        grad: the gradient: a spec, or TorchDEQ's own number of steps.
        lam: TorchDEQ's `tau`, for its own gradients.
        implicit: whether TorchDEQ's own implicit differentiation is used in place of `grad`.
        layer: "torchdeq", with this package, or the equilibrium layer of another library, see
            `peers.LAYERS`. With the latter, `grad`, `lam` and `f_solver` have no effect.
        compile: whether f is compiled.
        solve_dtype: the dtype of most of the forward solve, such as "bfloat16"; "" for that of the
            model.
        warm_start: whether solves in training begin at the last equilibria of the same images. A
            run that is resumed begins its first epoch without them, so its numbers differ.
        pretrain_steps: the number of first steps that backpropagate through a few evaluations of f.
        pretrain_layers: the number of these evaluations.
        f_solver: the forward solver.
        f_max_iter: the largest number of iterations of the forward solve; 0 for the preset's.
        eval_f_max_iter: the same in evaluation mode; 0 for `f_max_iter`.
        f_tol: the relative residual at which a solve stops; 0 for the published one.
        epochs: the number of passes over the training images.
        batch_size: the number of images per step, in all processes together.
        optimizer: "adam" or "sgd".
        lr: the largest learning rate.
        anneal: whether the learning rate falls to 1e-6 along half a cosine.
        momentum: the momentum of SGD.
        nesterov: whether SGD has Nesterov's momentum.
        weight_decay: the weight decay of the optimiser.
        eval_epochs: the number of epochs between measurements of the accuracy.
        eval_every: the number of steps between evaluations, which replaces `eval_epochs` and
            `radius_every`; 0 to use those two.
        eval_batch: the number of images per batch of an evaluation.
        eval_steps: numbers of damped steps after the solve. The accuracy is also measured with
            each of them.
        eval_lam: the damping of these steps.
        radius_images: the number of test images whose spectral radii are measured; 0 for none.
        radius_lam: the damping of the damped map, whose radius is also measured.
        radius_every: the number of steps between measurements of the radii; 0 to measure them with
            the accuracy.
        report_grads: the gradients whose cosines are measured, see `dpp.model_report`; may be
            empty.
        report_images: the number of test images on which the cosines are measured.
        report_every: the number of steps between these measurements: that between evaluations, or
            a multiple of it; 0 for every evaluation.
        same_time_as: the name of another run. This run takes as many steps as fit into its time.
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
        settings: the settings.
        seed: the seed of the weights, the order of the images, dropout and augmentation.
        data: the path of the images; None for digits and generated images.
        device: the device on which to train.
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
        processes.share(torch.arange(s.batch_size))  # fails here, and not in the first step
        self.epoch_steps = len(self.train_set.labels) // s.batch_size
        self.steps = s.epochs * self.epoch_steps
        self._accuracy_every = self.eval_every = s.eval_epochs * self.epoch_steps
        if s.radius_images and s.radius_every:
            self.eval_every = min(self._accuracy_every, s.radius_every)
        if s.eval_every:
            self._accuracy_every = self.eval_every = s.eval_every
        self.report_every = report_interval(s.report_every, self.eval_every)
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
            raise ValueError(
                f"report_grads beside layer={s.layer!r}; expected layer='torchdeq', since a report "
                "needs an equilibrium of this package"
            )
        if s.layer != "torchdeq":
            model.deq = peers.layer(s.layer, s.f_max_iter or model.config.f_max_iter, model.layer)
        self.model = model.to(device, memory_format=torch.channels_last)
        self.parallel = processes.parallel(self.model)
        self.optimizer = _optimizer(self.model, s)
        self._reader = ThreadPoolExecutor(1)
        self._next: tuple[int, Future[tuple[Tensor, Tensor, Tensor]]] | None = None

    def step(self, number: int) -> Tensor:
        """Take optimiser step `number` and return its loss, see `Task`."""
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
        """Return what is measured on test images after so many steps.

        - `accuracy`, `loss`, `residual`: of the states that the solver returns.
        - `accuracy_K`: the accuracy after K more damped steps, for each K of `eval_steps`.
        - `rho`, `rho_max`: the mean and the largest spectral radius of df/dh.
        - `rho_damped`: the mean spectral radius of the damped map.
        - the results of `_report`, if there are `report_grads`.

        Accuracy and loss are measured less often than the radii, see the settings.
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
        if s.report_grads and is_due(step, self.report_every, self.steps):
            found |= self._report()
        return found

    def _report(self) -> dict[str, float]:
        """Return what a report on test images says, see `reported`."""
        s = self.settings
        indices = torch.arange(min(s.report_images, len(self.test_set.labels)))
        labels = self.test_set.labels[indices].to(self.device)
        # These numbers belong to no training image, so the solves begin without a warm start.
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
        """Return the images, labels and indices of a step, and start to read the next step's."""
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
