"""Denoises a photograph with a deepinv equilibrium model, trained with several gradients.

    python examples/deepinv_denoise.py --steps 150 --grad own jacobian_free upg npg ift

The model is a plug-and-play proximal gradient algorithm, whose denoiser is a small convolutional
network. It is trained on patches of one photograph from scikit-learn, and tested on another whole
photograph. "own" is deepinv's implicit gradient, and "jacobian_free" its Jacobian-free gradient.
The other names are specs of deq_phantom_plugin. All models begin with the same weights and see the
same patches. Times are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.extras import require
from deq_phantom_plugin._plumbing.output import text_table

OWN: dict[str, dict[str, Any]] = {"own": {}, "jacobian_free": {"jacobian_free": True}}
PATCH = 32  # the side of a patch in pixels


class Denoiser(nn.Module):
    """Subtracts a residual that a small network computes; it is close to the identity at first."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, 1, 3, padding=1),
        )
        self.scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor, sigma: Any = None, **kwargs: Any) -> Tensor:
        """Return the denoised image, shape (B, 1, H, W)."""
        return x - self.scale * self.net(x)


def photograph(name: str) -> Tensor:
    """Return a photograph in grey, shape (1, 1, H, W); both sides are multiples of 32."""
    image = require("sklearn.datasets", "vision").load_sample_image(name)
    grey = torch.tensor(image).float().mean(dim=2) / 255
    height, width = (side // PATCH * PATCH for side in grey.shape)
    return grey[None, None, :height, :width]


def patches(image: Tensor, step: int, count: int) -> Tensor:
    """Return random patches of an image, shape (count, 1, 32, 32); the step is the seed."""
    generator = torch.Generator().manual_seed(step)
    top, left = (
        torch.randint(side - PATCH, (count,), generator=generator) for side in image.shape[2:]
    )
    return torch.cat(
        [
            image[:, :, y : y + PATCH, x : x + PATCH]
            for y, x in zip(top.tolist(), left.tolist(), strict=True)
        ]
    )


def make(grad: str, args: argparse.Namespace) -> Any:
    """Return a model; the weights are the same for every gradient."""
    import deepinv
    from deepinv.optim import PGD, DEQConfig

    torch.manual_seed(args.seed)
    return PGD(
        prior=deepinv.optim.PnP(denoiser=Denoiser()),
        data_fidelity=deepinv.optim.L2(),
        stepsize=0.5,
        max_iter=args.iterations,
        thres_conv=1e-4,
        early_stop=True,
        trainable_params=[],
        DEQ=DEQConfig(**OWN.get(grad, {"grad": grad})),
    ).train()


def psnr(x: Tensor, clean: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB, for images in [0, 1]."""
    return float(-10 * torch.log10((x - clean).square().mean()))


def main(argv: Sequence[str] | None = None) -> str:
    """Train one model per gradient, and return the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--grad", nargs="+", default=["own", "jacobian_free", "upg", "npg", "ift"], metavar="SPEC")
    add("--steps", type=int, default=150, help="optimiser steps (150)")
    add("--batch", type=int, default=8, help="patches per step (8)")
    add("--iterations", type=int, default=30, help="most iterations of the forward solve (30)")
    add("--noise", type=float, default=0.1, help="standard deviation; images are in [0, 1] (0.1)")
    add("--lr", type=float, default=2e-3, help="Adam's learning rate (2e-3)")
    add("--seed", type=int, default=0, help="seed of the weights (0)")
    args = parser.parse_args(argv)
    try:
        dpp.enable("deepinv")
    except ImportError as error:
        raise SystemExit(str(error)) from None
    import deepinv

    for grad in args.grad:
        if grad not in OWN:
            try:
                dpp.get_strategy(grad)
            except ValueError as error:
                parser.error(f"{error}; or {' or '.join(OWN)}")
    train, test = photograph("china.jpg"), photograph("flower.jpg")
    physics = deepinv.physics.Denoising()
    torch.manual_seed(args.seed + 1)
    noisy = test + args.noise * torch.randn_like(test)
    rows = [["the noisy image", f"{psnr(noisy, test):.2f}", "", ""]]
    for grad in args.grad:
        model = make(grad, args)
        optimizer = torch.optim.Adam(model.parameters(), args.lr)
        seconds, losses = [], []
        for step in range(args.steps):
            clean = patches(train, step, args.batch)
            torch.manual_seed(step)
            y = clean + args.noise * torch.randn_like(clean)
            begin = time.perf_counter()
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(y, physics), clean)
            loss.backward()
            optimizer.step()
            seconds.append(time.perf_counter() - begin)
            losses.append(float(loss.detach()))
        with torch.no_grad():
            found = psnr(model.eval()(noisy, physics), test)
        mean = statistics.fmean(losses[-10:])
        milliseconds = 1e3 * statistics.median(seconds)
        rows.append([grad, f"{found:.2f}", f"{mean:.2e}", f"{milliseconds:.0f}"])
    table = text_table(["gradient", "test PSNR (dB)", "training loss", "ms/step"], rows)
    print(table)
    return table


if __name__ == "__main__":
    main()
