"""`MDEQ`, the whole network: stem, equilibrium and classifier.

The stem turns an image into the injection of f. TorchDEQ solves h = f(h, injection) for one feature
map per resolution, and this package attaches the gradient. The head classifies the equilibrium.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.calls import Counted
from deq_phantom_plugin._plumbing.compilation import check_compile, compiled, never_compiled
from deq_phantom_plugin._plumbing.hints import hint, listed
from deq_phantom_plugin.contract.state import ordinary
from deq_phantom_plugin.forward.warm_start import Samples, starts_of
from deq_phantom_plugin.hosts.evaluation import attaches

from .config import PRESETS, MDEQConfig
from .layers import OncePerSolve, in_place
from .multiscale import MultiscaleLayer
from .solve import MDEQSolve, residual_of
from .stem_and_head import Head, make_stem


class MDEQ(nn.Module):
    """A multiscale deep equilibrium classifier (arXiv:2006.08656, Figure 1).

    The forward solve is the published one: Broyden's method from zeros, at most `config.f_max_iter`
    iterations, stopped at a relative residual of 1e-3.

    Args:
        config: the architecture, for instance `PRESETS["tiny"]`.
        num_classes: the number of logits per sample.
        in_channels: the channels of an image.
        grad: the gradient of the equilibrium: a spec of deq_phantom_plugin (name, mapping or
            strategy), TorchDEQ's number of phantom steps, or a list of these, one per sampled
            state. `dpp.set_grad(model, ...)` changes it later. With a number the model cannot be
            pickled, because TorchDEQ keeps a closure for it.
        dropout: replaces the dropout of the config.
        eval_steps: the number of damped steps h <- (1 - lam) h + lam f(h) after the solve in
            evaluation mode, as training with `upg` makes them. Trained models do not need them
            (Section 2 of the supplement of "On Training Implicit Models"); the option serves to
            verify that.
        eval_lam: the damping lam of these steps.
        compile: whether f is compiled, which happens in the first step; or a mode of
            `torch.compile`, see docs/howto/compile.md.
        warm_start: "sample" lets each solve in training begin at the latest equilibrium of the same
            images. Each call must then pass their numbers, see `dpp.SampleStarts` and
            docs/howto/solvers.md.
        **deq_settings: settings of `torchdeq.get_deq`. They replace the published settings
            (f_solver, f_max_iter, f_tol, f_stop_mode, core, n_states, tau, ift, ...).
            `grad_in_eval=True` attaches the gradient in evaluation mode too. An `f_solver` of this
            package, such as "broyden_fast", also takes `solve_dtype="bfloat16"`, see
            docs/howto/solvers.md.

    Attributes:
        last: the last forward solve, None before the first; it is not saved, copied or pickled.
        starts: what `warm_start` keeps, None without it; it is not saved, copied or pickled.

    Raises:
        ImportError: if TorchDEQ is not installed.
        ValueError: if `grad`, `dropout`, `eval_steps`, `eval_lam`, `compile` or `warm_start` is
            invalid.
    """

    compiles: bool | str = False  # older pickles do not have these two attributes
    starts: dpp.SampleStarts | None = None

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
        compile: bool | str = False,
        warm_start: str | None = None,
        **deq_settings: Any,
    ) -> None:
        super().__init__()
        if isinstance(eval_steps, bool) or not isinstance(eval_steps, int) or eval_steps < 0:
            raise ValueError(f"eval_steps={eval_steps!r}; expected a whole number of at least 0")
        if not 0 < eval_lam <= 1:
            raise ValueError(f"eval_lam={eval_lam!r}; expected a damping factor in (0, 1]")
        self.eval_steps, self.eval_lam = eval_steps, eval_lam
        self.compiles = check_compile(compile)  # `compile` is a method of modules
        self.starts = starts_of(warm_start)
        try:
            from torchdeq import get_deq
        except ImportError as error:
            raise ImportError(
                'MDEQ needs TorchDEQ: pip install "deq-phantom-plugin[vision]"'
            ) from error
        dpp.enable("torchdeq")
        self.config = config = config if dropout is None else replace(config, dropout=dropout)
        self.in_channels = in_channels
        self.stem = make_stem(in_channels, config)
        self.layer = MultiscaleLayer(config)
        self.head = Head(config, num_classes)
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
            num_classes: the number of logits per sample.
            in_channels: the channels of an image.
            grad: the gradient of the equilibrium.
            **settings: `dropout`, `eval_steps`, `eval_lam`, `compile`, `warm_start`, and settings
                of `torchdeq.get_deq`.

        Raises:
            ValueError: if the name is unknown.
        """
        if name not in PRESETS:
            near = hint(name, PRESETS)
            raise ValueError(f"unknown preset {name!r}{near}; there are {listed(PRESETS)}")
        return cls(PRESETS[name], num_classes, in_channels, grad, **settings)

    def equilibrium_func(
        self, injection: Tensor, shared: Sequence[Tensor | None] | None = None
    ) -> Callable[[list[Tensor]], list[Tensor]]:
        """Return f with this injection, for one solve and its backward pass.

        f maps a state to the next one and keeps its dtype. TorchDEQ passes views of a flat vector,
        so f first gives each state the memory format of the injection.

        Args:
            injection: what `self.stem` returns, shape (B, channels[0], H, W).
            shared: normalised weights and dropout masks, for instance those of `self.last`. If it
                is None, they are made here.
        """
        modules, memory_format = self._once_per_solve(), _memory_format(injection)
        tensors = self._share(injection) if shared is None else shared

        def func(state: list[Tensor]) -> list[Tensor]:
            formatted = [h.contiguous(memory_format=memory_format) for h in state]
            with in_place(modules, tensors):
                images = self.layer(formatted, injection)
            # Under autocast a normalisation may return another dtype.
            return [image.to(h.dtype) for image, h in zip(images, state, strict=True)]

        return func

    def initial_state(self, injection: Tensor) -> list[Tensor]:
        """Return zeros, one tensor per branch, with the injection's dtype, device and format."""
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
        samples: Samples | None = None,
    ) -> Any:
        """Classify images.

        Args:
            x: images, shape (B, in_channels, H, W). Both sides are multiples of
                `self.config.size_divisor`; B may be 0.
            all_states: whether to classify also the states that the solve samples on its way
                (`n_states`, in training), for `torchdeq.loss.fp_correction`.
            jac_reg: the schedule of a Jacobian regulariser. If it is given, its penalty is returned
                as well: `logits, penalty = model(x, jac_reg=schedule)`; add it to the loss. The
                schedule uses the step of `dpp.set_step`.
            samples: the number of each image in the data set, shape (B,), for `warm_start`. It is
                ignored without `warm_start`, and in evaluation mode.

        Returns:
            Logits of shape (B, num_classes). With `all_states`, a list of them; those of the
            equilibrium come last. With `jac_reg`, a pair of the logits and a scalar, which is zero
            outside training and in steps without a regulariser.

        Raises:
            ValueError: if the images have another shape. In training with `warm_start`, also if
                `samples` is missing or a strategy owns the solve.
        """
        self._check(x)
        injection = self.stem(x)
        shared = self._share(injection)
        func = self.equilibrium_func(injection, shared)
        start = self.initial_state(injection)
        starts = self.starts if self.training else None
        if starts is not None:
            start = starts.begin(samples, start)
        states = self._solve(func, injection, shared, start)
        if starts is not None:
            starts.keep(samples, states[-1])
        logits = [self.head(state) for state in states] if all_states else self.head(states[-1])
        if jac_reg is None:
            return logits
        penalty = None
        if self.training and torch.is_grad_enabled() and len(x):
            penalty = self._penalty(jac_reg, func, [h.detach() for h in states[-1]])
        return logits, injection.new_zeros(()) if penalty is None else penalty

    def spectral_radius(self, lam: float | None = None, **options: Any) -> Tensor:
        """Estimate the spectral radius of df/dh at the equilibrium of the last forward pass.

        Call this before the optimiser's step: the weights of the normalisations are the present
        ones, not those of the last forward pass.

        Args:
            lam: a damping factor, for the radius of the damped map instead.
            **options: further arguments of `dpp.spectral_radius`.

        Returns:
            One radius per sample, shape (B,).

        Raises:
            RuntimeError: before the first forward pass, or if the last batch had no images.
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

    def _solve(
        self,
        func: Callable[[list[Tensor]], list[Tensor]],
        injection: Tensor,
        shared: list[Tensor | None],
        start: list[Tensor],
    ) -> list[list[Tensor]]:
        """Return the states for the classifier, with the equilibrium last, and set `last`."""
        func = compiled(func, self.compiles, self)
        counted = Counted(lambda *state: func(list(state)))
        states: list[list[Tensor]]
        if len(injection):
            states, info = self.deq(counted, start)
        else:  # no images: one evaluation gives every parameter a gradient of zero
            states = [counted(*start)] * (len(self.deq.indexing) if self.training else 1)
            info = {"rel_lowest": injection.new_zeros(0)}
        if not self.training:
            for _ in range(self.eval_steps):
                states = [*states[:-1], self._damped_step(counted, states[-1])]
        solved = [h.detach() for h in states[-1]]
        # If a strategy owns the solve, TorchDEQ does not measure a residual.
        owned = not counted.calls.by_solver()
        if owned and len(injection) and self.training and self.starts is not None:
            raise ValueError(
                "warm_start='sample' with a strategy that differentiates its own steps from the "
                "initial state; expected one that begins at an equilibrium, such as 'upg'"
            )
        residual = residual_of(func, solved) if owned else info["rel_lowest"].detach()
        self.last = MDEQSolve(
            residual=residual,
            nfe=counted.calls.of_solve(),
            equilibrium=solved,
            injection=injection.detach(),
            shared=[None if tensor is None else tensor.detach() for tensor in shared],
        )
        return states

    @never_compiled  # the training step changes, and would cause a new compilation each time
    def _penalty(
        self,
        jac_reg: dpp.JacobianRegularization,
        func: Callable[[list[Tensor]], list[Tensor]],
        state: list[Tensor],
    ) -> Tensor | None:
        memories = (m for m in self.deq.modules() if isinstance(m, dpp.Memory))
        return jac_reg(func, state, next((m.step for m in memories), None))

    def _damped_step(self, func: Callable[..., list[Tensor]], state: list[Tensor]) -> list[Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and attaches(self.deq)):
            pairs = zip(state, func(*state), strict=True)
            return [torch.lerp(h, new, self.eval_lam) for h, new in pairs]

    def _once_per_solve(self) -> list[OncePerSolve]:
        """Return the layers of f that use a tensor of the solve, in a fixed order."""
        return [m for m in self.layer.modules() if isinstance(m, OncePerSolve)]

    def _share(self, injection: Tensor) -> list[Tensor | None]:
        """Make the tensors of a solve, in the order of `_once_per_solve`."""
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
