"""The map f of an MDEQ: residual blocks for each resolution, then a fusion of all resolutions."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import MDEQConfig
from .layers import GroupNorm, VariationalDropout2d, WeightNormConv2d


class _ResidualBlock(nn.Module):
    """A residual block of one resolution (Figure 2 of arXiv:2006.08656)."""

    def __init__(self, channels: int, config: MDEQConfig) -> None:
        super().__init__()
        inner = config.expansion * channels
        self.expand = nn.Sequential(
            WeightNormConv2d(channels, inner, 3),
            GroupNorm(config.groups, inner),
            nn.ReLU(inplace=True),
        )
        self.reduce = WeightNormConv2d(inner, channels, 3)
        self.dropout = VariationalDropout2d(channels, config.dropout)
        self.inner_norm = GroupNorm(config.groups, channels)
        self.outer_norm = GroupNorm(config.groups, channels)

    def forward(self, x: Tensor, injection: Tensor | None = None) -> Tensor:
        out: Tensor = self.dropout(self.reduce(self.expand(x)))
        if injection is not None:
            out = out + injection
        out = self.outer_norm(F.relu_(self.inner_norm(out) + x))
        return out


def _resample(source: int, target: int, config: MDEQConfig) -> nn.Module:
    """Return a module that brings branch `source` to the resolution and channels of `target`."""
    channels, out = config.channels[source], config.channels[target]
    if source == target:
        return nn.Identity()
    if source > target:
        return nn.Sequential(
            WeightNormConv2d(channels, out, 1),
            GroupNorm(config.groups, out),
            nn.Upsample(scale_factor=2 ** (source - target), mode="nearest"),
        )
    layers: list[nn.Module] = []
    for width in [channels] * (target - source - 1) + [out]:
        layers += [
            WeightNormConv2d(channels, width, 3, stride=2),
            GroupNorm(config.groups, width),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers[:-1])


class _Branch(nn.ModuleList):
    """The residual blocks of one resolution; the first of them adds the injection."""

    def forward(self, x: Tensor, injection: Tensor | None) -> Tensor:
        for block in self:
            x, injection = block(x, injection), None
        return x


class _Fusion(nn.ModuleList):
    """The sum of all branches, each resampled to one resolution by a module of its own."""

    def forward(self, scales: list[Tensor]) -> Tensor:
        brought: list[Tensor] = [to(x) for to, x in zip(self, scales, strict=True)]
        return functools.reduce(torch.add, brought)


class MultiscaleLayer(nn.Module):
    """The map f (Figure 1 of arXiv:2006.08656).

    A state has one tensor per branch, of shape (B, channels[i], H / 2^i, W / 2^i) for branch i.

    Args:
        config: the architecture.
    """

    def __init__(self, config: MDEQConfig) -> None:
        super().__init__()
        n = len(config.channels)
        self.branches = nn.ModuleList(
            _Branch(_ResidualBlock(channels, config) for _ in range(number))
            for channels, number in zip(config.channels, config.blocks, strict=True)
        )
        self.fuse = nn.ModuleList(
            _Fusion(_resample(j, i, config) for j in range(n)) for i in range(n)
        )
        self.finish = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(inplace=True),  # in place is safe: nothing else uses the sum
                WeightNormConv2d(channels, channels, 1),
                GroupNorm(config.groups // 2, channels),
            )
            for channels in config.channels
        )

    def forward(self, state: Sequence[Tensor], injection: Tensor) -> list[Tensor]:
        """Return f(state), one tensor per branch.

        Args:
            state: one tensor per branch.
            injection: shape (B, channels[0], H, W); it is added in branch 0.
        """
        injections = [injection, *[None] * (len(state) - 1)]
        scales = [
            branch(x, u) for branch, x, u in zip(self.branches, state, injections, strict=True)
        ]
        return [finish(fuse(scales)) for fuse, finish in zip(self.fuse, self.finish, strict=True)]
