"""`MDEQConfig`, the architecture of an MDEQ, and `PRESETS`, the published architectures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class MDEQConfig:
    """The architecture of an MDEQ.

    A branch is one resolution of the state. Branch 0 has the highest resolution, and each further
    branch has half the resolution of the one before.

    Attributes:
        channels: the channels of the state, one number per branch.
        head_channels: the channels of the classifier's bottlenecks, one number per branch.
        final_channels: the number of features that the last linear layer gets.
        f_max_iter: the number of iterations of the forward solve (F_THRES in the official files).
        f_solver: TorchDEQ's name of the forward solver.
        groups: the number of groups of each GroupNorm; the last GroupNorm of a branch has half.
        expansion: the inner width of the residual blocks, as a multiple of their channels.
        blocks: the number of residual blocks, one number per branch; empty for one block each.
        downsample_times: how often the image is halved before f, at most 2 times.
        dropout: the probability of dropping a channel of a residual block.

    Raises:
        ValueError: if the values do not fit together.
    """

    channels: tuple[int, ...]
    head_channels: tuple[int, ...]
    final_channels: int
    f_max_iter: int
    f_solver: str = "broyden"
    groups: int = 8
    expansion: int = 5
    blocks: tuple[int, ...] = ()
    downsample_times: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        n = len(self.channels)
        object.__setattr__(self, "blocks", self.blocks or (1,) * n)
        if n < 2:
            raise ValueError(
                f"channels={self.channels}; expected one number per branch, at least 2 of them"
            )
        for name in ("channels", "head_channels", "blocks"):
            numbers = getattr(self, name)
            if len(numbers) != n or min(numbers) < 1:
                raise ValueError(f"{name}={numbers}; expected {n} positive numbers, one per branch")
        if self.groups < 2 or self.groups % 2 or any(c % self.groups for c in self.channels):
            raise ValueError(
                f"groups={self.groups} with channels={self.channels}; expected an even number "
                "that divides each number of channels"
            )
        if self.downsample_times not in (0, 1, 2):
            raise ValueError(f"downsample_times={self.downsample_times}; expected 0, 1 or 2")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}; expected a probability in [0, 1)")

    @property
    def size_divisor(self) -> int:
        """The number of which both sides of an image must be multiples, so that branches match."""
        return int(2 ** (self.downsample_times + len(self.channels) - 1))


# The numbers are those of the named files, in experiments/ of github.com/locuslab/mdeq. Their
# dropout (0.25 in TINY, 0.3 in CIFAR's LARGE) is left out, as in TorchDEQ's version; pass
# `dropout=` to have it.
PRESETS: Mapping[str, MDEQConfig] = MappingProxyType(
    {
        # cifar/cls_mdeq_TINY.yaml
        "tiny": MDEQConfig((24, 24), (8, 16), final_channels=200, f_max_iter=22),
        # imagenet/cls_mdeq_SMALL.yaml
        "small": MDEQConfig(
            (32, 64, 128, 256), (24, 48, 96, 192), 2048, f_max_iter=26, downsample_times=2
        ),
        # cifar/cls_mdeq_LARGE.yaml
        "large": MDEQConfig((32, 64, 128, 256), (14, 28, 56, 112), 1680, f_max_iter=18),
        # imagenet/cls_mdeq_XL.yaml
        "xl": MDEQConfig(
            (88, 176, 352, 704), (32, 64, 128, 256), 2048, 27, expansion=6, downsample_times=2
        ),
    }
)
