"""The network."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.calls import Counted
from deq_phantom_plugin._plumbing.compilation import never_compiled
from deq_phantom_plugin._plumbing.hints import hint, listed
from deq_phantom_plugin._plumbing.trial import Trial
from deq_phantom_plugin.contract.state import ordinary
from deq_phantom_plugin.hosts.evaluation import attaches

__all__ = ["MDEQ", "PRESETS", "MDEQConfig", "MDEQSolve", "VariationalDropout2d", "WeightNormConv2d"]


@dataclass(frozen=True)
class MDEQConfig:
    """What an MDEQ is made of; branch 0 has the highest resolution, each next one half of it.

    Attributes:
        channels: of the state, one number a branch.
        head_channels: of the classifier's bottlenecks, one number a branch.
        final_channels: features that the last linear layer sees.
        f_max_iter: iterations of the forward solve (F_THRES of the official files).
        f_solver: TorchDEQ's name of the forward solver.
        groups: of each GroupNorm; the last one of a branch has half as many.
        expansion: inner width of the residual blocks, in multiples of their channels.
        blocks: residual blocks, one number a branch; empty for one in each.
        downsample_times: halvings of the image before f, at most 2.
        dropout: probability of dropping a channel of a residual block.

    Raises:
        ValueError: if these do not fit together.
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
            raise ValueError(f"channels={self.channels}; expected one number a branch, at least 2")
        for name in ("channels", "head_channels", "blocks"):
            numbers = getattr(self, name)
            if len(numbers) != n or min(numbers) < 1:
                raise ValueError(f"{name}={numbers}; expected {n} positive numbers, one a branch")
        if self.groups < 2 or self.groups % 2 or any(c % self.groups for c in self.channels):
            raise ValueError(
                f"groups={self.groups} with channels={self.channels}; expected an even number "
                "that divides them all"
            )
        if self.downsample_times not in (0, 1, 2):
            raise ValueError(f"downsample_times={self.downsample_times}; expected 0, 1 or 2")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}; expected a probability in [0, 1)")

    @property
    def size_divisor(self) -> int:
        """Both sides of an image must be multiples of this, so that resolutions match."""
        return int(2 ** (self.downsample_times + len(self.channels) - 1))


# Numbers from the files named, in experiments/ of github.com/locuslab/mdeq. Their dropout (0.25 in
# TINY, 0.3 in CIFAR's LARGE) is left out, as in TorchDEQ's version: ask for it with `dropout=`.
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


@dataclass(frozen=True, eq=False)
class MDEQSolve:
    """The last forward solve of an `MDEQ`; nothing in it carries an autograd graph.

    Attributes:
        residual: ||f(h) - h|| / ||f(h)|| of each sample, the lowest that was reached, shape (B,).
        nfe: evaluations of f that the solve took for the batch, an integer tensor of shape ().
        equilibrium: the last state handed to the classifier, one tensor a branch.
        injection: what the image enters f as, shape (B, channels[0], H, W).
        shared: the normalised weights and dropout masks of the solve.
    """

    residual: Tensor
    nfe: Tensor
    equilibrium: list[Tensor] = field(repr=False)
    injection: Tensor = field(repr=False)
    shared: list[Tensor | None] = field(repr=False)


class _OncePerSolve(nn.Module):
    """Uses a tensor, `shared`, that is made once a forward and serves all evaluations of f.

    f puts it in place for as long as an evaluation takes, so that one that backward repeats
    (activation checkpointing) sees what its own forward saw, and the module holds no graph in
    between. TorchDEQ's `apply_norm` leaves one on the module, which copy.deepcopy then refuses.
    """

    shared: Tensor | None = None

    def make(self, injection: Tensor) -> Tensor | None:
        raise NotImplementedError


class WeightNormConv2d(_OncePerSolve):
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


class VariationalDropout2d(_OncePerSolve):
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


class _ResidualBlock(nn.Module):
    """The residual block of one resolution (Figure 2)."""

    def __init__(self, channels: int, config: MDEQConfig) -> None:
        super().__init__()
        inner = config.expansion * channels
        self.expand = nn.Sequential(
            WeightNormConv2d(channels, inner, 3),
            nn.GroupNorm(config.groups, inner),
            nn.ReLU(inplace=True),
        )
        self.reduce = WeightNormConv2d(inner, channels, 3)
        self.dropout = VariationalDropout2d(channels, config.dropout)
        self.inner_norm = nn.GroupNorm(config.groups, channels)
        self.outer_norm = nn.GroupNorm(config.groups, channels)

    def forward(self, x: Tensor, injection: Tensor | None = None) -> Tensor:
        out: Tensor = self.dropout(self.reduce(self.expand(x)))
        if injection is not None:
            out = out + injection
        out = self.outer_norm(F.relu_(self.inner_norm(out) + x))
        return out


def _resample(source: int, target: int, config: MDEQConfig) -> nn.Module:
    """Bring branch `source` to the resolution and channels of branch `target`."""
    channels, out = config.channels[source], config.channels[target]
    if source == target:
        return nn.Identity()
    if source > target:
        return nn.Sequential(
            WeightNormConv2d(channels, out, 1),
            nn.GroupNorm(config.groups, out),
            nn.Upsample(scale_factor=2 ** (source - target), mode="nearest"),
        )
    layers: list[nn.Module] = []
    for width in [channels] * (target - source - 1) + [out]:
        layers += [
            WeightNormConv2d(channels, width, 3, stride=2),
            nn.GroupNorm(config.groups, width),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers[:-1])


class _Branch(nn.ModuleList):
    """The residual blocks of one resolution, of which the first sees the injection."""

    def forward(self, x: Tensor, injection: Tensor | None) -> Tensor:
        for block in self:
            x, injection = block(x, injection), None
        return x


class _Fusion(nn.ModuleList):
    """The sum of all branches, each brought to one of them by a module of its own."""

    def forward(self, scales: list[Tensor]) -> Tensor:
        brought: list[Tensor] = [to(x) for to, x in zip(self, scales, strict=True)]
        return functools.reduce(torch.add, brought)


class _MultiscaleLayer(nn.Module):
    """The map f (Figure 1), on states of one tensor (B, channels[i], H / 2^i, W / 2^i) a branch."""

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
                nn.ReLU(inplace=True),  # of the sum, which is nobody else's
                WeightNormConv2d(channels, channels, 1),
                nn.GroupNorm(config.groups // 2, channels),
            )
            for channels in config.channels
        )

    def forward(self, state: Sequence[Tensor], injection: Tensor) -> list[Tensor]:
        injections = [injection, *[None] * (len(state) - 1)]  # the highest resolution's only
        scales = [
            branch(x, u) for branch, x, u in zip(self.branches, state, injections, strict=True)
        ]
        return [finish(fuse(scales)) for fuse, finish in zip(self.fuse, self.finish, strict=True)]


def _conv_norm(
    channels: int, out: int, size: int, stride: int = 1, bias: bool = False, affine: bool = True
) -> nn.Sequential:
    """Convolution from N(0, 0.01), the official initialisation, and BatchNorm: all outside f."""
    conv = nn.Conv2d(channels, out, size, stride, padding=size // 2, bias=bias)
    for parameter in conv.parameters():
        nn.init.normal_(parameter, std=0.01)
    return nn.Sequential(conv, nn.BatchNorm2d(out, affine=affine))


def _stem(in_channels: int, config: MDEQConfig) -> nn.Sequential:
    """From the image to the injection."""
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
    """The classifier's residual block, to four times `width` channels."""

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


class _Head(nn.Module):
    """The classifier: all branches are widened, brought to the lowest resolution and pooled."""

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
        y = self.widen[0](state[0])
        for down, widen, x in zip(self.down, self.widen[1:], state[1:], strict=True):
            y = widen(x) + down(y)
        logits: Tensor = self.classifier(self.final(y).mean(dim=(2, 3)))
        return logits


class MDEQ(nn.Module):
    """A multiscale deep equilibrium classifier (arXiv:2006.08656, Figure 1).

    The forward solve is the published one: Broyden from zeros, `config.f_max_iter` iterations,
    stopped at a relative residual of 1e-3.

    Args:
        config: the architecture, for instance `PRESETS["tiny"]`.
        num_classes: logits a sample.
        in_channels: channels of an image.
        grad: the gradient of the equilibrium: a spec of deq_phantom_plugin (name, mapping or
            strategy), TorchDEQ's number of phantom steps, or a list of these, one for each sampled
            state. `dpp.set_grad(model, ...)` changes it later. With a number the model cannot be
            pickled, because TorchDEQ keeps a closure for it.
        dropout: overrides the config's.
        eval_steps: damped steps h <- (1 - lam) h + lam f(h) that follow the solve in eval mode, as
            training with `upg` has them. Trained models need none (Section 2 of the supplement of
            "On Training Implicit Models"); this is there to see that.
        eval_lam: their damping.
        **deq_settings: for `torchdeq.get_deq`, unchanged; they override the published ones
            (f_solver, f_max_iter, f_tol, f_stop_mode, core, n_states, tau, ift, ...), and
            `grad_in_eval=True` for a gradient in evaluation mode too.

    Attributes:
        last: the last forward solve, None before the first; not saved, copied or pickled.

    Raises:
        ImportError: without TorchDEQ.
        ValueError: on a `grad`, `dropout`, `eval_steps` or `eval_lam` that cannot be.
    """

    def __init__(
        self,
        config: MDEQConfig,
        num_classes: int = 10,
        in_channels: int = 3,
        grad: Any = "upg",
        *,
        dropout: float | None = None,
        eval_steps: int = 0,
        eval_lam: float = 0.5,
        **deq_settings: Any,
    ) -> None:
        super().__init__()
        if isinstance(eval_steps, bool) or not isinstance(eval_steps, int) or eval_steps < 0:
            raise ValueError(f"eval_steps={eval_steps!r}; expected a whole number of at least 0")
        if not 0 < eval_lam <= 1:
            raise ValueError(f"eval_lam={eval_lam!r}; expected a damping factor in (0, 1]")
        self.eval_steps, self.eval_lam = eval_steps, eval_lam
        try:
            from torchdeq import get_deq
        except ImportError as error:
            raise ImportError(
                'MDEQ needs TorchDEQ: pip install "deq-phantom-plugin[vision]"'
            ) from error
        dpp.enable("torchdeq")
        self.config = config = config if dropout is None else replace(config, dropout=dropout)
        self.in_channels = in_channels
        self.stem = _stem(in_channels, config)
        self.layer = _MultiscaleLayer(config)
        self.head = _Head(config, num_classes)
        published = {
            "f_solver": config.f_solver,
            "f_max_iter": config.f_max_iter,
            "f_tol": 1e-3,
            "f_stop_mode": "rel",
        }
        self.deq = get_deq({**published, **deq_settings, "grad": grad})
        self.last: MDEQSolve | None = None

    @classmethod
    def from_preset(
        cls,
        name: str,
        num_classes: int = 10,
        in_channels: int = 3,
        grad: Any = "upg",
        **settings: Any,
    ) -> MDEQ:
        """Build a published architecture; the other arguments are those of the class.

        Args:
            name: "tiny" or "large" (made for CIFAR), "small" or "xl" (for ImageNet).
            num_classes: logits a sample.
            in_channels: channels of an image.
            grad: the gradient of the equilibrium.
            **settings: `dropout`, `eval_steps`, `eval_lam`, and settings of `torchdeq.get_deq`.

        Raises:
            ValueError: on an unknown name.
        """
        if name not in PRESETS:
            near = hint(name, PRESETS)
            raise ValueError(f"unknown preset {name!r}{near}; there are {listed(PRESETS)}")
        return cls(PRESETS[name], num_classes, in_channels, grad, **settings)

    def equilibrium_func(
        self, injection: Tensor, shared: Sequence[Tensor | None] | None = None
    ) -> Callable[[list[Tensor]], list[Tensor]]:
        """Return f at this injection, from a state to the next, for one solve and its backward.

        A state comes out in the dtype it had, and f sees it in the injection's memory format, which
        TorchDEQ's flat vector loses.

        Args:
            injection: what `self.stem` returns, shape (B, channels[0], H, W).
            shared: normalised weights and dropout masks, those of `self.last` for instance; made
                anew if None.
        """
        modules, memory_format = self._once_per_solve(), _memory_format(injection)
        tensors = self._share(injection) if shared is None else shared

        def func(state: list[Tensor]) -> list[Tensor]:
            formatted = [h.contiguous(memory_format=memory_format) for h in state]
            with _in_place(modules, tensors):
                images = self.layer(formatted, injection)
            # Under autocast a normalisation may return another dtype.
            return [image.to(h.dtype) for image, h in zip(images, state, strict=True)]

        return func

    def initial_state(self, injection: Tensor) -> list[Tensor]:
        """Return zeros: a tensor a branch, of the injection's dtype, device and memory format."""
        batch, _, height, width = injection.shape
        return [
            injection.new_zeros(batch, channels, height >> i, width >> i).contiguous(
                memory_format=_memory_format(injection)
            )
            for i, channels in enumerate(self.config.channels)
        ]

    def forward(
        self,
        x: Tensor,
        all_states: bool = False,
        jac_reg: dpp.JacobianRegularization | None = None,
    ) -> Any:
        """Classify images.

        Args:
            x: images, shape (B, in_channels, H, W), both sides multiples of
                `self.config.size_divisor`; B may be 0.
            all_states: also classify the states that the solve sampled on its way (`n_states`, in
                training), for `torchdeq.loss.fp_correction`.
            jac_reg: also return the Jacobian regulariser of this training step, which joins the
                loss: `logits, penalty = model(x, jac_reg=schedule)`. Its schedule has the step of
                `dpp.set_step`.

        Returns:
            Logits of shape (B, num_classes); with `all_states` a list of them, in which those of
            the equilibrium come last. With `jac_reg` a pair of these and a scalar, which is zero
            outside training and in steps that have no regulariser.

        Raises:
            ValueError: on images of another shape.
        """
        self._check(x)
        injection = self.stem(x)
        shared = self._share(injection)
        func = self.equilibrium_func(injection, shared)
        start = self.initial_state(injection)
        counted = Counted(lambda *state: func(list(state)))

        if len(x):
            states, info = self.deq(counted, start)
        else:  # nothing to solve; one evaluation, so that every parameter has a gradient of zero
            states = [counted(*start)] * (len(self.deq.indexing) if self.training else 1)
            info = {"rel_lowest": injection.new_zeros(0)}
        if not self.training:
            for _ in range(self.eval_steps):
                states = [*states[:-1], self._damped_step(counted, states[-1])]
        solved = [h.detach() for h in states[-1]]
        # Where a strategy owns the solve, TorchDEQ has no residual.
        residual = (
            info["rel_lowest"].detach() if counted.calls.by_solver() else _residual(func, solved)
        )
        self.last = MDEQSolve(
            residual=residual,
            nfe=counted.calls.of_solve(),
            equilibrium=solved,
            injection=injection.detach(),
            shared=[None if tensor is None else tensor.detach() for tensor in shared],
        )
        logits = [self.head(state) for state in states] if all_states else self.head(states[-1])
        if jac_reg is None:
            return logits
        penalty = None
        if self.training and torch.is_grad_enabled() and len(x):
            penalty = self._penalty(jac_reg, func, solved)
        return logits, injection.new_zeros(()) if penalty is None else penalty

    def spectral_radius(self, lam: float | None = None, **options: Any) -> Tensor:
        """Estimate rho(df/dh) of each sample at the last forward's equilibrium, shape (B,).

        Ask before the optimiser's step: the affine part of the normalisations is the present one.

        Args:
            lam: a damping factor, for the radius of the damped map instead.
            **options: of `dpp.spectral_radius`.

        Raises:
            RuntimeError: before the first forward, or after one on no images.
        """
        if self.last is None:
            raise RuntimeError("no equilibrium yet: call the model on a batch first")
        if not len(self.last.injection):
            raise RuntimeError("the last batch had no images: call the model on another one first")
        func = self.equilibrium_func(
            ordinary(self.last.injection),
            [None if tensor is None else ordinary(tensor) for tensor in self.last.shared],
        )
        return dpp.spectral_radius(
            func, [ordinary(h) for h in self.last.equilibrium], lam, **options
        )

    @never_compiled  # for the sake of the step, which changes
    def _penalty(
        self,
        jac_reg: dpp.JacobianRegularization,
        func: Callable[[list[Tensor]], list[Tensor]],
        state: list[Tensor],
    ) -> Tensor | None:
        memories = (m for m in self.deq.modules() if isinstance(m, dpp.Memory))
        return jac_reg(func, state, next((m.step for m in memories), None))

    def _damped_step(self, func: Callable[..., list[Tensor]], state: list[Tensor]) -> list[Tensor]:
        with torch.set_grad_enabled(attaches(self.deq)):
            pairs = zip(state, func(*state), strict=True)
            return [torch.lerp(h, new, self.eval_lam) for h, new in pairs]

    def _once_per_solve(self) -> list[_OncePerSolve]:
        return [m for m in self.layer.modules() if isinstance(m, _OncePerSolve)]

    def _share(self, injection: Tensor) -> list[Tensor | None]:
        return [module.make(injection) for module in self._once_per_solve()]

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"images have shape {tuple(x.shape)}; expected (batch, {self.in_channels}, "
                "height, width)"
            )
        divisor = self.config.size_divisor
        if any(side < 1 or side % divisor for side in x.shape[2:]):
            raise ValueError(
                f"images are {x.shape[2]} x {x.shape[3]}; expected both sides to be positive "
                f"multiples of {divisor} ({len(self.config.channels)} resolutions, "
                f"{self.config.downsample_times} halvings before them)"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": None}


def _memory_format(x: Tensor) -> torch.memory_format:
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


@contextlib.contextmanager
def _in_place(modules: Sequence[_OncePerSolve], tensors: Sequence[Tensor | None]) -> Iterator[None]:
    """Put the shared tensors on their modules."""
    try:
        for module, tensor in zip(modules, tensors, strict=True):
            module.shared = tensor
        yield
    finally:
        for module in modules:
            module.shared = None


@never_compiled
@torch.no_grad()
def _residual(func: Callable[[list[Tensor]], list[Tensor]], state: list[Tensor]) -> Tensor:
    """Return ||f(h) - h|| / ||f(h)|| of each sample."""
    with Trial(state):
        h, image = (torch.cat([x.flatten(1) for x in s], dim=1) for s in (state, func(state)))
    residual: Tensor = (image - h).norm(dim=1) / (image.norm(dim=1) + 1e-9)
    return residual
