"""The parts of an MDEQ outside f: the stem before the equilibrium, and the classifier after it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from .config import MDEQConfig


def _conv_norm(
    channels: int, out: int, size: int, stride: int = 1, bias: bool = False, affine: bool = True
) -> nn.Sequential:
    """Return a convolution and a BatchNorm, drawn as in the official code from N(0, 0.01^2)."""
    conv = nn.Conv2d(channels, out, size, stride, padding=size // 2, bias=bias)
    for parameter in conv.parameters():
        nn.init.normal_(parameter, std=0.01)
    return nn.Sequential(conv, nn.BatchNorm2d(out, affine=affine))


def make_stem(in_channels: int, config: MDEQConfig) -> nn.Sequential:
    """Return the stem, which turns an image into the injection of f.

    Args:
        in_channels: the channels of an image.
        config: the architecture.
    """
    width, times = config.channels[0], config.downsample_times
    layers = [
        _conv_norm(in_channels, width, 3, stride=2 if times >= 1 else 1),
        nn.ReLU(inplace=True),
        _conv_norm(width, width, 3, stride=2 if times >= 2 else 1),
        nn.ReLU(inplace=True),
    ]
    if times > 0 or len(config.channels) > 2:
        layers += [_conv_norm(width, width, 1), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class _Bottleneck(nn.Module):
    """A residual block of the classifier, with `4 * width` channels of output."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            _conv_norm(channels, width, 1, affine=False),
            nn.ReLU(inplace=True),
            _conv_norm(width, width, 3, affine=False),
            nn.ReLU(inplace=True),
            _conv_norm(width, 4 * width, 1, affine=False),
        )
        same = channels == 4 * width
        self.shortcut = nn.Identity() if same else _conv_norm(channels, 4 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.residual(x) + self.shortcut(x))


class Head(nn.Module):
    """The classifier: it widens all branches, brings them to the lowest resolution and pools.

    Args:
        config: the architecture.
        num_classes: the number of logits per sample.
    """

    def __init__(self, config: MDEQConfig, num_classes: int) -> None:
        super().__init__()
        pairs = zip(config.channels, config.head_channels, strict=True)
        self.widen = nn.ModuleList(_Bottleneck(channels, width) for channels, width in pairs)
        widths = [4 * width for width in config.head_channels]
        self.down = nn.ModuleList(
            nn.Sequential(_conv_norm(fine, coarse, 3, stride=2, bias=True), nn.ReLU(inplace=True))
            for fine, coarse in itertools.pairwise(widths)
        )
        self.final = nn.Sequential(
            _conv_norm(widths[-1], config.final_channels, 1, bias=True), nn.ReLU(inplace=True)
        )
        self.classifier = nn.Linear(config.final_channels, num_classes)

    def forward(self, state: Sequence[Tensor]) -> Tensor:
        """Return logits, shape (B, num_classes)."""
        y = self.widen[0](state[0])
        for down, widen, x in zip(self.down, self.widen[1:], state[1:], strict=True):
            y = widen(x) + down(y)
        logits: Tensor = self.classifier(self.final(y).mean(dim=(2, 3)))
        return logits
