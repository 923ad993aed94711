"""The training runs of a comparison: an MDEQ is trained once per gradient method.

All runs begin at the same weights, and have the same order of data and the same solver. After each
run its gradient is compared with the exact one.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._plumbing.once import muted
from ..diagnostics.measure.cost import now, peak_bytes
from ..strategies.registry import get_strategy
from ..switch import set_grad, set_step
from .data import Dataset

if TYPE_CHECKING:
    from ..adapters.mdeq import MDEQ

EXACT = "ift(tol=1e-9, max_iter=400)"
_WARM_UP = 3  # first steps, whose times are not counted


@dataclass(frozen=True)
class Settings:
    """What all methods of a comparison share.

    Attributes:
        preset: the size of the model, see `MDEQ.from_preset`.
        steps: the number of optimiser steps.
        batch_size: the number of images per step.
        lr: Adam's largest learning rate; it anneals to zero along a cosine.
        seed: the seed of the initialisation and of the data order.
        device: the device to train on.
        deq: further arguments of `MDEQ.from_preset`, such as settings of TorchDEQ.
    """

    preset: str = "tiny"
    steps: int = 130
    batch_size: int = 64
    lr: float = 3e-3
    seed: int = 0
    device: str | torch.device = "cpu"
    deq: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MethodResult:
    """The result of one method's training run.

    Attributes:
        spec: the spec of the method.
        step_seconds: the median time of a training step.
        backward_share: the median share of a step that the backward pass takes.
        accuracy: the accuracy on the test images, in [0, 1].
        cosine: the cosine of the gradient to the exact one, at the same equilibrium of the trained
            model. It is that of the equilibrium layer's parameters, on one held-out batch, in
            float64.
        exact_residual: the relative residual that was reached there: that of the equilibrium, or
            that of the exact gradient's own solve, whichever is larger.
        peak_bytes: the most memory that one training step held, above model, optimiser and data.
        losses: the loss of each step.
        seconds: the time of training until the end of each step.
    """

    spec: str
    step_seconds: float
    backward_share: float
    accuracy: float
    cosine: float
    exact_residual: float
    peak_bytes: int
    losses: list[float]
    seconds: list[float]


def compare(
    methods: Sequence[str],
    data: Dataset,
    settings: Settings | None = None,
    on_step: Callable[[str, int, float], None] = lambda spec, step, loss: None,
    on_result: Callable[[MethodResult], None] = lambda result: None,
) -> list[MethodResult]:
    """Train an MDEQ once per method, all else equal.

    Args:
        methods: the specs of the methods.
        data: the images.
        settings: the settings that all runs share; None for the defaults.
        on_step: called after each step with the method, the number of the step from 1, and the
            loss.
        on_result: called with the result of each method, when it is done.

    Returns:
        One result per method, in their order.

    Raises:
        ValueError: before any training, if a spec is invalid or the images do not fit the preset.
        ImportError: without TorchDEQ.
    """
    from ..adapters.mdeq import MDEQ

    settings = Settings() if settings is None else settings
    for spec in methods:
        get_strategy(spec)
    torch.manual_seed(settings.seed)
    start = MDEQ.from_preset(
        settings.preset,
        num_classes=len(data.classes),
        in_channels=data.train_images.shape[1],
        **settings.deq,
    )
    with torch.no_grad():
        copy.deepcopy(start)(data.train_images[:2])  # refuses images that do not fit
    results = []
    for spec in methods:
        result = _train(start, spec, data, settings, on_step)
        on_result(result)
        results.append(result)
    return results


def _train(
    start: MDEQ,
    spec: str,
    data: Dataset,
    settings: Settings,
    on_step: Callable[[str, int, float], None],
) -> MethodResult:
    """Train a copy of the model with one method, and measure it."""
    device = torch.device(settings.device)
    model = copy.deepcopy(start).to(device)
    set_grad(model, spec)
    optimizer = torch.optim.Adam(model.parameters(), settings.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    torch.manual_seed(settings.seed)
    losses: list[float] = []
    times: list[tuple[float, float]] = []

    def step(images: Tensor, labels: Tensor) -> tuple[Tensor, float, float]:
        """Return the loss, and the seconds of the step and of its backward pass."""
        begin = now(device)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        before = now(device)
        loss.backward()
        after = now(device)
        optimizer.step()
        return loss, now(device) - begin, after - before

    model.train()
    for number, (images, labels) in enumerate(_batches(data, settings, device)):
        set_step(model, number, total=settings.steps)
        loss, total, backward = step(images, labels)
        scheduler.step()
        times.append((total, backward))
        losses.append(loss.item())
        on_step(spec, number + 1, losses[-1])

    accuracy = _accuracy(model, data, settings)
    images = data.train_images[: settings.batch_size].to(device)
    labels = data.train_labels[: settings.batch_size].to(device)
    cosine, residual = _cosine(model, spec, data, device)
    peak = peak_bytes(lambda: step(images, labels), device)
    counted = times[_WARM_UP:] or times
    return MethodResult(
        spec=spec,
        step_seconds=statistics.median(total for total, _ in counted),
        backward_share=statistics.median(backward / total for total, backward in counted),
        accuracy=accuracy,
        cosine=cosine,
        exact_residual=residual,
        peak_bytes=peak,
        losses=losses,
        seconds=list(accumulate(total for total, _ in times)),
    )


def _batches(
    data: Dataset, settings: Settings, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the images and labels of each step; the order is drawn anew for each epoch."""
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(settings.steps):
        if len(order) < settings.batch_size:
            order = torch.randperm(len(data.train_labels), generator=generator)
        chosen, order = order[: settings.batch_size], order[settings.batch_size :]
        yield data.train_images[chosen].to(device), data.train_labels[chosen].to(device)


def _accuracy(model: MDEQ, data: Dataset, settings: Settings) -> float:
    """Return the share of test images that the model classifies right."""
    model.eval()
    right = 0
    with torch.no_grad():
        for images, labels in zip(
            data.test_images.split(256), data.test_labels.split(256), strict=True
        ):
            predicted = model(images.to(settings.device)).argmax(dim=1).cpu()
            right += int((predicted == labels).sum())
    model.train()
    return right / len(data.test_labels)


def _cosine(model: MDEQ, spec: str, data: Dataset, device: torch.device) -> tuple[float, float]:
    """Return the cosine to the exact gradient, and the residual of the solves behind the latter.

    Both gradients are those of a copy of the model in float64, whose forward solve is tight.
    """
    images = data.test_images[:32].to(device, torch.float64)
    labels = data.test_labels[:32].to(device)
    twin = copy.deepcopy(model).double()
    # With the statistics of evaluation, batch normalisation leaves samples independent.
    for module in twin.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    deq = twin.deq
    deq.f_max_iter, deq.f_tol, deq.f_stop_mode = 200, 1e-9, "rel"
    deq.solve_dtype = None
    deq.indexing = deq._compute_f_iter(deq.f_max_iter)
    residuals: list[float] = []

    def gradient(method: str) -> Tensor:
        set_grad(twin, method)
        twin.zero_grad()
        F.cross_entropy(twin(images), labels).backward()
        parts = [p.grad.flatten() for p in twin.layer.parameters() if p.grad is not None]
        return torch.cat(parts)

    with muted(Warning):  # the table shows the residual instead
        own = gradient(spec)
        original = deq.forward
        deq.forward = lambda *args, **kwargs: original(
            *args,
            backward_writer=lambda info: residuals.append(float(info["rel_lowest"].max())),
            **kwargs,
        )
        exact = gradient(EXACT)
    cosine = F.cosine_similarity(own, exact, dim=0).item()
    return cosine, max([*residuals, float(twin.last.residual.max())])
