"""Layers of f, some of which use a tensor that is made once per solve.

`WeightNormConv2d` uses its normalised weight, and `VariationalDropout2d` a dropout mask. Each
evaluation of f in one solve gets the same tensor, so f is the same map all through the solve.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class OncePerSolve(nn.Module):
    """A layer that uses a tensor, `shared`, which is made once per solve.

    f sets `shared` at the beginning of each evaluation, and removes it at the end. So an evaluation
    that is repeated in the backward pass (activation checkpointing) uses the tensor of its own
    solve. Between evaluations the module holds no graph. TorchDEQ's `apply_norm` leaves a graph on
    the module, which copy.deepcopy refuses.
    """

    shared: Tensor | None = None

    def make(self, injection: Tensor) -> Tensor | None:
        """Return the tensor of a solve with this injection, or None if the layer needs none."""
        raise NotImplementedError


class WeightNormConv2d(OncePerSolve):
    """A convolution without bias whose weight is g v / ||v||, with one norm per output channel.

    Source: Salimans & Kingma, "Weight Normalization", 2016, arXiv:1602.07868, eq. 2.

    Args:
        in_channels: the channels of the input.
        out_channels: the channels of the output.
        kernel_size: an odd number. The size of the output is that of the input divided by the
            stride, rounded up.
        stride: the stride.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1
    ) -> None:
        super().__init__()
        # v has PyTorch's own initialisation, and g = ||v||. TorchDEQ's version trains from the same
        # weights: it draws N(0, 0.01) into the derived weight, which the next forward overwrites.
        v = nn.Conv2d(in_channels, out_channels, kernel_size, bias=False).weight.detach()
        self.weight_g = nn.Parameter(torch.linalg.vector_norm(v, dim=(1, 2, 3), keepdim=True))
        self.weight_v = nn.Parameter(v)
        self.stride, self.padding = stride, kernel_size // 2

    def make(self, injection: Tensor | None = None) -> Tensor:
        """Return g v / ||v||, in the memory format of v."""
        norm = torch.linalg.vector_norm(self.weight_v, dim=(1, 2, 3), keepdim=True)
        weight: Tensor = self.weight_v * (self.weight_g / norm)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, in_channels, H, W) with the shared weight."""
        weight = self.make() if self.shared is None else self.shared
        return F.conv2d(x, weight, stride=self.stride, padding=self.padding)

    def extra_repr(self) -> str:
        """Show the weight's shape and the stride."""
        return f"{tuple(self.weight_v.shape)}, stride={self.stride}"


class GroupNorm(nn.GroupNorm):
    """PyTorch's GroupNorm, written in another way for the compiler on a CPU.

    The compiler makes slow code for a reduction over the few channels of a group if the channels
    come last in memory, as its convolutions want them. So each channel is reduced by itself first.
    Then the channels of a group are combined: the variance of the group is the mean of their
    variances plus the variance of their means.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, channels, H, W)."""
        full = x.dtype in (torch.float32, torch.float64) and self.weight.dtype == x.dtype
        if not (torch.compiler.is_compiling() and full and x.device.type == "cpu"):
            return super().forward(x)
        shape = (x.shape[0], self.num_groups, -1)
        # Per channel, shape (B, channels); then per group, shape (B, groups, channels per group).
        var, mean = torch.var_mean(x, dim=(2, 3), correction=0)
        var, mean = var.view(shape), mean.view(shape)
        center = mean.mean(-1, keepdim=True)
        var = (var + (mean - center).square()).mean(-1, keepdim=True)
        # (x - center) / std * weight + bias is x * scale + shift, with one pair per channel.
        scale = (var + self.eps).rsqrt() * self.weight.view(1, self.num_groups, -1)
        shift = self.bias.view(1, self.num_groups, -1) - center * scale
        scale, shift = (s.flatten(1)[:, :, None, None] for s in (scale, shift))
        return x * scale + shift


class VariationalDropout2d(OncePerSolve):
    """Dropout of whole channels; all evaluations of f in one solve drop the same channels.

    Source: Gal & Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural
    Networks", 2016, arXiv:1512.05287. Unlike TorchDEQ's, this layer makes its masks on the device
    of the model.

    Args:
        channels: the number of channels of the input.
        p: the probability of dropping a channel.
    """

    def __init__(self, channels: int, p: float) -> None:
        super().__init__()
        self.channels, self.p = channels, p

    def make(self, injection: Tensor) -> Tensor | None:
        """Draw a mask of shape (B, channels, 1, 1), or return None outside training."""
        if not self.training or self.p == 0:
            return None
        mask = injection.new_empty(injection.shape[0], self.channels, 1, 1)
        return mask.bernoulli_(1 - self.p).div_(1 - self.p)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the shared mask to (B, channels, H, W)."""
        return x if self.shared is None else x * self.shared

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"{self.channels}, p={self.p}"


@contextlib.contextmanager
def in_place(modules: Sequence[OncePerSolve], tensors: Sequence[Tensor | None]) -> Iterator[None]:
    """Set the shared tensors on their modules for the time of a `with` block."""
    try:
        for module, tensor in zip(modules, tensors, strict=True):
            module.shared = tensor
        yield
    finally:
        for module in modules:
            module.shared = None
