"""Checks that this installation computes right gradients, on a map where they have a closed form.

`deq-phantom doctor --report` prints the result, for issues on wrong gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..attach import attach
from ..contract.strategy import Context

# The relative error that each strategy may have. With a spectral radius of 0.5, 40 steps leave an
# error of 0.5^40. ift stops at its tolerance.
_BOUNDS = {
    "exact": 1e-10,
    "ift(tol=1e-8)": 1e-6,
    "npg(k=40, lam=1.0)": 1e-10,
    "upg(k=40, lam=1.0)": 1e-10,
    "bptt(steps=50)": 1e-10,
}
_RADIUS, _WIDTH, _BATCH = 0.5, 8, 4


@dataclass(frozen=True)
class Check:
    """How far one strategy's gradient is from the closed form.

    Attributes:
        strategy: the spec of the strategy.
        device: the device on which the gradient was computed.
        error: the relative error of the gradient; or in words what was raised.
        right: whether the error is small enough for this strategy.
    """

    strategy: str
    device: str
    error: float | str
    right: bool

    def __str__(self) -> str:
        error = self.error if isinstance(self.error, str) else f"relative error {self.error:.1e}"
        return f"{self.strategy:20} {self.device:5} {'right' if self.right else 'WRONG'}, {error}"


def self_check() -> list[Check]:
    """Check strategies on a small linear map in float64, on the CPU and on a GPU if there is one.

    The map is h = W h + u, and the loss is <c, h>. Each sample has h* = (I - W)^-1 u. dL/dW is the
    sum over the samples of g h*^T, where g = (I - W^T)^-1 c. This closed form uses no strategy.
    """
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [_check(spec, bound, device) for device in devices for spec, bound in _BOUNDS.items()]


def _check(spec: str, bound: float, device: str) -> Check:
    weight, u, c = (tensor.to(device) for tensor in _problem())
    inverse = torch.linalg.inv(torch.eye(_WIDTH, dtype=weight.dtype, device=device) - weight)
    h = u @ inverse.mT  # each row is a sample: (I - W)^-1 u, shape (batch, width)
    expected = (c @ inverse).mT @ h  # rows of c @ inverse are (I - W^T)^-1 c; shape (width, width)
    weight.requires_grad_()
    start = torch.zeros_like(h) if spec.startswith("bptt") else h
    try:
        with torch.enable_grad():
            state = attach(lambda h: h @ weight.mT + u, start, spec, Context(batch_dim=0))
            (found,) = torch.autograd.grad((c * state).sum(), weight)  # type: ignore[operator]
    except Exception as error:  # the report is there to show what is broken, whatever that is
        return Check(spec, device, f"{type(error).__name__}: {error}", right=False)
    off = float((found - expected).norm() / expected.norm())
    return Check(spec, device, off, right=off <= bound)


def _problem() -> tuple[Tensor, Tensor, Tensor]:
    """Return W, u and c, the same each time; the largest singular value of W is `_RADIUS`.

    The shapes are (width, width), (batch, width) and (batch, width).
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(_WIDTH, _WIDTH, generator=generator, dtype=torch.float64)
    left, _, right = torch.linalg.svd(noise)
    values = torch.linspace(0.1, _RADIUS, _WIDTH, dtype=torch.float64)
    u, c = torch.randn(2, _BATCH, _WIDTH, generator=generator, dtype=torch.float64)
    return left @ torch.diag(values) @ right, u, c
