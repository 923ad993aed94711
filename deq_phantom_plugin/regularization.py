"""When, and how strongly, the Jacobian of an equilibrium is regularised in training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ._plumbing.compilation import never_compiled
from ._plumbing.once import warn_once
from .contract.errors import AssumptionWarning
from .contract.state import State
from .jacobian import jacobian_reg
from .strategies.arguments import positive_int


@dataclass(frozen=True)
class JacobianRegularization:
    """The schedule of a Jacobian regulariser: weight * ||J||_F^2 / numel, in some of the steps.

    Source: Bai, Koltun & Kolter, "Stabilizing Equilibrium Models by Jacobian Regularization", ICML
    2021, arXiv:2106.14342, section 4. There a random part of the steps is enough, and the weight
    grows with training. The published language model has weight 2.0, freq 0.4, and an increment of
    0.1 every 30000 steps.

    Attributes:
        weight: the weight of the term in the loss; 0 for none.
        freq: the probability that a step has the term, drawn from PyTorch's CPU generator.
        increment: by how much the weight grows every `interval` steps. A negative one lets the
            weight fall, at most to 0.
        interval: the training steps from one increment to the next; needed with an increment.
        n_samples: the number of Hutchinson probes per step. A step costs one evaluation of F, and
            one vector-Jacobian product per probe.

    Raises:
        ValueError: if a number is out of range.
    """

    weight: float = 0.0
    freq: float = 1.0
    increment: float = 0.0
    interval: int | None = None
    n_samples: int = 1

    def __post_init__(self) -> None:
        if not 0 <= _number("weight", self.weight) < float("inf"):
            raise ValueError(f"weight={self.weight!r}; expected a finite number of at least 0")
        if not 0 <= _number("freq", self.freq) <= 1:
            raise ValueError(f"freq={self.freq!r}; expected a probability in [0, 1]")
        if not abs(_number("increment", self.increment)) < float("inf"):
            raise ValueError(f"increment={self.increment!r}; expected a finite number")
        if self.interval is not None:
            positive_int("interval", self.interval)
        elif self.increment:
            raise ValueError(
                f"increment={self.increment!r} without an interval; expected interval, the number "
                "of steps from one increment to the next"
            )
        positive_int("n_samples", self.n_samples)

    def weight_at(self, step: int | None) -> float:
        """Return the weight in a training step. None, a step that nobody told, counts as 0."""
        if not self.increment or self.interval is None:
            return self.weight
        if step is None:
            warn_once(
                "jacobian regularization",
                f"{self!r} was not told the training step and takes it to be 0; call "
                "dpp.set_step(model, step) in the training loop",
                AssumptionWarning,
            )
            step = 0
        return max(0.0, self.weight + self.increment * (step // self.interval))

    @never_compiled
    def __call__(
        self, func: Callable[[State], State], equilibrium: State, step: int | None = None
    ) -> Tensor | None:
        """Return the term to add to the loss of this step; None where the step has none.

        Args:
            func: F, see `dpp.jacobian_reg`.
            equilibrium: h*, detached.
            step: the training step.
        """
        weight = self.weight_at(step)
        # Nothing is drawn where chance decides nothing, so that other random numbers stay the same.
        if weight == 0 or (self.freq < 1 and torch.rand(()).item() >= self.freq):
            return None
        return weight * jacobian_reg(func, equilibrium, self.n_samples)


def _number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}={value!r}; expected a number")
    return value
