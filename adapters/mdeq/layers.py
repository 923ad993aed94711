"""Layers that use a tensor made once a solve: a normalised weight, a dropout mask."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class OncePerSolve(nn.Module):
    """Uses a tensor, `shared`, that is made once a forward and serves all evaluations of f.

    f puts it in place for as long as an evaluation takes, so that one that backward repeats
    (activation checkpointing) sees what its own forward saw, and the module holds no graph in
    between. TorchDEQ's `apply_norm` leaves one on the module, which copy.deepcopy then refuses.
    """

    shared: Tensor | None = None

    def make(self, injection: Tensor) -> Tensor | None:
        """Return the tensor of a solve at this injection, None for none."""
        raise NotImplementedError


class WeightNormConv2d(OncePerSolve):
    """Convolution without bias whose weight is g v / ||v||, one norm an output channel.

    Salimans & Kingma, "Weight Normalization", 2016, arXiv:1602.07868, eq. 2.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: odd; the output's size is the input's over the stride, rounded up.
        stride: of the output.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1
    ) -> None:
        super().__init__()
        # PyTorch's own initialisation with g = ||v||, which is what TorchDEQ's version trains from:
        # its N(0, 0.01) is written to the derived weight, and the next forward replaces that.
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
    """PyTorch's normalisation; on a CPU the compiler gets it in a form that it makes fast code of.

    Of a reduction over the few channels of a group it makes slow code, where the channels come
    last as they do for its convolutions. So channels are reduced first, each by itself, and then
    combined: the variance of a group is the mean of their variances plus the variance of their
    means.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, channels, H, W)."""
        full = x.dtype in (torch.float32, torch.float64) and self.weight.dtype == x.dtype
        if not (torch.compiler.is_compiling() and full and x.device.type == "cpu"):
            return super().forward(x)
        shape = (x.shape[0], self.num_groups, -1)
        var, mean = torch.var_mean(x, dim=(2, 3), correction=0)
        var, mean = var.view(shape), mean.view(shape)
        center = mean.mean(-1, keepdim=True)
        var = (var + (mean - center).square()).mean(-1, keepdim=True)
        scale = (var + self.eps).rsqrt() * self.weight.view(1, self.num_groups, -1)
        shift = self.bias.view(1, self.num_groups, -1) - center * scale
        scale, shift = (s.flatten(1)[:, :, None, None] for s in (scale, shift))
        return x * scale + shift


class VariationalDropout2d(OncePerSolve):
    """Dropout of whole channels, the same ones in every evaluation of f of one solve.

    Gal & Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural
    Networks", 2016, arXiv:1512.05287. (TorchDEQ's makes its masks on the CPU.)

    Args:
        channels: of the input.
        p: probability of dropping one.
    """

    def __init__(self, channels: int, p: float) -> None:
        super().__init__()
        self.channels, self.p = channels, p

    def make(self, injection: Tensor) -> Tensor | None:
        """Draw a mask (B, channels, 1, 1), None outside training."""
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
    """Put the shared tensors on their modules."""
    try:
        for module, tensor in zip(modules, tensors, strict=True):
            module.shared = tensor
        yield
    finally:
        for module in modules:
            module.shared = None
