"""The work of the contests: maps with their equilibria, and models to train.

A `Problem` is a map F at its equilibrium. A `Training` is a model whose equilibrium module can be
replaced. All contenders of a contest get the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import deq_phantom_plugin as dpp
from deq_phantom_plugin.contract.state import State

from .accounting import Counted
from .contest import Settings, Unavailable
from .data import load_images

# The deq-zoo calls the first one "small"; it is our preset "tiny".
MDEQ_NAMES = {"tiny": "MDEQ-tiny (deq-zoo's small)", "small": 'MDEQ "small" preset'}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
TRAIN_STEPS = {"tiny": 300, "small": 100}
# Further steps with Jacobian regularisation, and its weight. After them, most solves converge.
REGULARISED_STEPS, JACOBIAN_WEIGHT = 200, 1.0


@dataclass(frozen=True)
class Problem:
    """A map at its equilibrium, with the gradient that comes in there.

    Attributes:
        name: a description of the problem.
        func: F, from a state to a state. A state is a tensor or a list of tensors.
        start: the state at which a forward solve begins.
        equilibrium: h*, detached.
        cotangents: v = dL/dh*, one tensor per tensor of the state.
        tensors: the leaf tensors of F that get gradients.
        residual: the largest ||F(h*) - h*|| / ||F(h*)|| of all samples.
    """

    name: str
    func: Counted
    start: State
    equilibrium: State
    cotangents: list[Tensor]
    tensors: list[Tensor]
    residual: float

    def spread(self, *leaves: Tensor) -> Any:
        """Evaluate F as TorchDEQ calls it, with one argument per tensor of the state."""
        return self.func(leaves[0] if isinstance(self.start, Tensor) else list(leaves))

    def backward(self, attached: State) -> None:
        """Differentiate an attached equilibrium with respect to `tensors`."""
        for tensor in self.tensors:
            tensor.grad = None
        torch.autograd.backward(tree_leaves(attached), self.cotangents)

    @property
    def known(self) -> list[Tensor]:
        """The tensors that exist before anything runs."""
        return [*self.tensors, *tree_leaves(self.equilibrium), *self.cotangents]


@torch.no_grad()
def residuals(func: Callable[[State], State], state: State) -> Tensor:
    """Return ||F(h) - h|| / ||F(h)|| of each sample, shape (B,)."""
    h, image = (
        torch.cat([leaf.flatten(1) for leaf in tree_leaves(s)], dim=1) for s in (state, func(state))
    )
    return (image - h).norm(dim=1) / image.norm(dim=1)


# --- synthetic --------------------------------------------------------------------------------


class Synthetic(nn.Module):
    """F(h) = phi(W (h + u)), where W is symmetric and has the spectral norm L.

    Source: section 4.1 of the supplement of "On Training Implicit Models".

    Args:
        width: D, the size of a state.
        norm: L.
        activation: phi.
        settings: the settings of the suite.
    """

    def __init__(
        self, width: int, norm: float, activation: Callable[[Tensor], Tensor], settings: Settings
    ) -> None:
        super().__init__()
        raw = torch.randn(width, width, generator=torch.Generator().manual_seed(width))
        weight = (raw + raw.mT) / 2
        # The extreme eigenvalues are computed exactly, which costs D^3 operations.
        ends = torch.linalg.eigvalsh(weight.double())[[0, -1]]
        weight = weight * float(norm / ends[ends.abs().argmax()])
        self.weight = nn.Parameter(weight.to(settings.device, settings.dtype))
        self.activation = activation
        self.deq: Any = None

    def map(self, u: Tensor) -> Callable[[Tensor], Tensor]:
        """Return F for an injection u of shape (B, D)."""
        return lambda h: self.activation(F.linear(h + u, self.weight))

    def forward(self, u: Tensor) -> Tensor:
        """Return the equilibrium that the module `deq` solves for and attaches, shape (B, D)."""
        states, _ = self.deq(self.map(u), torch.zeros_like(u))
        return states[-1]


def synthetic(
    width: int,
    batch: int,
    settings: Settings,
    norm: float = 0.9,
    activation: Callable[[Tensor], Tensor] = torch.tanh,
) -> Problem:
    """Return the synthetic map at its equilibrium; phi is tanh, or `torch.clone` for a linear F."""
    generator = torch.Generator().manual_seed(batch)
    model = Synthetic(width, norm, activation, settings)
    u = torch.randn(batch, width, generator=generator).to(model.weight).requires_grad_()
    v = torch.randn(batch, width, generator=generator).to(model.weight) / (batch * width)
    func = model.map(u)
    with torch.no_grad():
        if activation is torch.clone:
            # (I - W) h = W u; an iteration would need a thousand steps with a norm of 0.99.
            weight = model.weight.double()
            identity = torch.eye(width, dtype=weight.dtype, device=weight.device)
            h = torch.linalg.solve(identity - weight, weight @ u.double().mT).mT.to(u.dtype)
        else:
            h = torch.zeros_like(u)
            for _ in range(200):
                h = func(h)
        residual = float(residuals(func, h).max())
    kind = "linear" if activation is torch.clone else activation.__name__
    name = f"synthetic ({kind}, L={norm}), D={width}, batch {batch}"
    start = torch.zeros_like(h)
    return Problem(name, Counted(func), start, h, [v], [model.weight, u], residual)


# --- MDEQ -------------------------------------------------------------------------------------


def _mdeq_class() -> type[nn.Module]:
    """Return a subclass of our MDEQ for the benchmarks."""
    try:
        import torchdeq  # noqa: F401
    except ImportError:
        raise Unavailable("TorchDEQ, on which the MDEQ adapter stands, is not installed") from None
    from deq_phantom_plugin.adapters.mdeq import MDEQ

    class BenchMDEQ(MDEQ):
        """An MDEQ whose f need not restore the memory format of the state.

        TorchDEQ's flat vector loses that format, and the f of our adapter restores it. Without
        that, f is as users of TorchDEQ write it, for instance in the deq-zoo's MDEQ.
        """

        restores_format = True

        def equilibrium_func(
            self, injection: Tensor, shared: Sequence[Tensor | None] | None = None
        ) -> Callable[[list[Tensor]], list[Tensor]]:
            """Return f with this injection, see `MDEQ.equilibrium_func`."""
            if self.restores_format:
                return super().equilibrium_func(injection, shared)
            modules = [m for m in self.layer.modules() if hasattr(m, "make")]
            tensors = [m.make(injection) for m in modules] if shared is None else shared

            def func(state: list[Tensor]) -> list[Tensor]:
                for module, tensor in zip(modules, tensors, strict=True):
                    module.shared = tensor
                try:
                    return self.layer(state, injection)
                finally:
                    for module in modules:
                        module.shared = None

            return func

    return BenchMDEQ


@lru_cache(maxsize=3)
def trained_mdeq(preset: str, settings: Settings, regularised: bool = False) -> Any:
    """Return an MDEQ after some steps of Adam with UPG; it is cached on disk.

    If `regularised`, further steps with Jacobian regularisation follow.
    """
    cls = _mdeq_class()
    images = load_images(settings.images)
    steps, batch, side = (1, 2, 8) if settings.quick else (TRAIN_STEPS[preset], 16, 32)
    data = "".join(c if c.isalnum() else "-" for c in images.name)
    file = settings.cache / f"mdeq-{preset}-{steps}-{data}.pt"
    torch.manual_seed(0)
    model = cls.from_preset(preset, grad="upg", f_solver="anderson", f_max_iter=12)
    model.to(settings.device)
    if regularised:
        model.load_state_dict(trained_mdeq(preset, settings).state_dict())
        steps = min(steps, REGULARISED_STEPS)
        file = file.with_stem(f"{file.stem}-regularised-{steps}")
    if file.is_file():
        model.load_state_dict(torch.load(file, map_location=settings.device, weights_only=True))
        return model.to(settings.dtype)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(int(regularised))
    for _ in range(steps):
        chosen = torch.randint(len(images.labels), (batch,), generator=generator)
        optimizer.zero_grad()
        logits = model(images.pixels[chosen, :, :side, :side].to(settings.device))
        loss = F.cross_entropy(logits, images.labels[chosen].to(settings.device))
        if regularised:
            func = model.equilibrium_func(model.last.injection, model.last.shared)
            equilibrium = [h.detach() for h in model.last.equilibrium]
            loss = loss + JACOBIAN_WEIGHT * dpp.jacobian_reg(func, equilibrium)
        loss.backward()
        optimizer.step()
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), file)
    return model.to(settings.dtype)


def mdeq(
    preset: str,
    settings: Settings,
    layout: str = "contiguous",
    batch: int = 32,
    side: int = 32,
    regularised: bool = False,
) -> Problem:
    """Return a trained MDEQ at the equilibrium of a batch of images, with the gradient of its loss.

    f does not restore the memory format of the state, see `restoring`. If `regularised`, the batch
    has the images with the lowest residuals, of twice as many.
    """
    if settings.quick:
        batch, side = min(batch, 2), 8
    model = trained_mdeq(preset, settings, regularised)
    images = load_images(settings.images)
    pixels = images.batch(2 * batch if regularised else batch, side, FORMATS[layout])
    pixels = pixels.to(settings.device, settings.dtype)
    labels = images.labels[: len(pixels)].to(settings.device)
    iterations = 5 if settings.quick else 60
    equilibrium = _solved(model, pixels, iterations)
    if regularised:
        func = model.equilibrium_func(model.last.injection, model.last.shared)
        chosen = residuals(func, equilibrium).argsort()[:batch].sort().values
        pixels, labels = pixels[chosen].contiguous(memory_format=FORMATS[layout]), labels[chosen]
        equilibrium = _solved(model, pixels, iterations)
    # TorchDEQ's solver returns views of a flat vector. The clones have the format of the images.
    kept = FORMATS[layout]
    leaves = [h.clone(memory_format=kept).requires_grad_() for h in equilibrium]
    loss = F.cross_entropy(model.head(leaves), labels)
    cotangents = list(torch.autograd.grad(loss, leaves))
    leaves = [h.detach() for h in leaves]
    cotangents = [v.contiguous(memory_format=kept) for v in cotangents]
    injection = model.last.injection.requires_grad_()
    shared = [t if t is None else t.clone().requires_grad_() for t in model.last.shared]
    model.restores_format = False
    func = model.equilibrium_func(injection, shared)
    # The weights of f's convolutions are in `shared`. Its other parameters are those of the
    # normalisations.
    affine = [p for name, p in model.layer.named_parameters() if "weight_" not in name]
    tensors = [injection, *(t for t in shared if t is not None), *affine]
    name = f"{MDEQ_NAMES[preset]}, batch {batch} of {side} x {side}, {layout}"
    if regularised:
        radii = dpp.spectral_radius(func, leaves, tol=1e-2).sort().values
        low, middle, high = (float(radii[i]) for i in (0, len(radii) // 2, -1))
        name += f" (of {2 * batch} those with an equilibrium), regularised, "
        name += f"rho(J) {low:.2f} to {high:.2f}, median {middle:.2f}"
    start = [torch.zeros_like(h) for h in leaves]
    residual = float(residuals(func, leaves).max())
    return Problem(name, Counted(func), start, leaves, cotangents, tensors, residual)


def restoring(problem: Problem) -> Problem:
    """Return a problem whose f first restores the memory format of `start`, as our adapter does."""
    formats = [
        torch.contiguous_format if h.is_contiguous() else torch.channels_last for h in problem.start
    ]
    func = problem.func.func

    def restored(state: list[Tensor]) -> list[Tensor]:
        return func([h.contiguous(memory_format=f) for h, f in zip(state, formats, strict=True)])

    return replace(problem, func=Counted(restored))


def _solved(model: Any, pixels: Tensor, iterations: int) -> list[Tensor]:
    """Return the equilibrium of images, solved with Broyden's method to a small tolerance."""
    from torchdeq import get_deq

    before = model.deq
    # Only `deq` is in evaluation mode: BatchNorm goes on with the batch's own statistics.
    model.deq = get_deq(
        f_solver="broyden", f_max_iter=iterations, f_tol=1e-6, f_stop_mode="rel"
    ).eval()
    model.restores_format = True
    with torch.no_grad():
        model(pixels)
    model.deq = before
    equilibrium: list[Tensor] = model.last.equilibrium
    return equilibrium


# --- whole models -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """A model for training steps, whose equilibrium module can be replaced.

    Attributes:
        name: a description of the model and the batch.
        holder: the module whose attribute `deq` solves and attaches.
        loss: computes the loss of the batch.
        parameters: the parameters of the model.
    """

    name: str
    holder: Any
    loss: Callable[[], Tensor]
    parameters: list[nn.Parameter]


def mdeq_training(preset: str, settings: Settings, layout: str) -> Training:
    """Return a trained MDEQ and a batch of 32 images to classify."""
    batch, side = (2, 8) if settings.quick else (32, 32)
    model = trained_mdeq(preset, settings)
    model.restores_format = True
    images = load_images(settings.images)
    pixels = images.batch(batch, side, FORMATS[layout]).to(settings.device, settings.dtype)
    labels = images.labels[:batch].to(settings.device)
    return Training(
        f"{MDEQ_NAMES[preset]}, batch {batch} of {side} x {side}, {layout}",
        model,
        lambda: F.cross_entropy(model(pixels), labels),
        list(model.parameters()),
    )


def transformer_training(width: int, batch: int, length: int, settings: Settings) -> Training:
    """Return an untrained DEQ transformer, and random tokens to predict."""
    try:
        from deq_phantom_plugin.adapters.transformer import (
            DEQTransformerConfig,
            DEQTransformerForCausalLM,
        )
    except ImportError as error:
        raise Unavailable(str(error)) from None
    if settings.quick:
        width, batch, length = 32, 2, 8
    torch.manual_seed(0)
    config = DEQTransformerConfig(
        vocab_size=1000,
        hidden_size=width,
        num_attention_heads=max(2, width // 64),
        intermediate_size=4 * width,
        max_position_embeddings=length,
    )
    model = DEQTransformerForCausalLM(config).to(settings.device, settings.dtype).train()
    ids = torch.randint(1000, (batch, length), device=settings.device)
    return Training(
        f"transformer of width {width}, batch {batch} of {length} random tokens",
        model.model,
        lambda: model(ids, labels=ids).loss,
        list(model.parameters()),
    )


def synthetic_training(width: int, batch: int, settings: Settings) -> Training:
    """Return the synthetic map as a model; its loss is the mean squared error to random numbers."""
    model = Synthetic(width, 0.9, torch.tanh, settings)
    generator = torch.Generator().manual_seed(0)
    u, y = (torch.randn(batch, width, generator=generator).to(model.weight) for _ in range(2))
    return Training(
        f"synthetic (tanh, L=0.9), D={width}, batch {batch}",
        model,
        lambda: F.mse_loss(model(u), y),
        list(model.parameters()),
    )
