"""When, and how strongly, the Jacobian of an equilibrium is regularised in training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ._plumbing.compilation import never_compiled
from ._plumbing.once import warn_once
from .contract.errors import ConvergenceWarning
from .contract.state import State
from .jacobian import jacobian_reg
from .strategies.arguments import positive_int


@dataclass(frozen=True)
class JacobianRegularization:
    """The schedule of a Jacobian regulariser: weight * ||J||_F^2 / numel, in some of the steps.

    Bai, Koltun & Kolter, "Stabilizing Equilibrium Models by Jacobian Regularization", ICML 2021,
    arXiv:2106.14342, section 4: a random part of the steps is enough, and the weight grows with
    training. The published language model has weight 2.0, freq 0.4, and an increment of 0.1 every
    30000 steps.

    Attributes:
        weight: of the term in the loss; 0 for none.
        freq: the probability that a step has the term, drawn from PyTorch's CPU generator.
        increment: what the weight grows by every `interval` steps, negative to let it fall;
            it never falls below 0.
        interval: in training steps; needed where there is an increment.
        n_samples: Hutchinson probes a step. Each costs one evaluation of F at most, and one
            vector-Jacobian product.

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
                f"increment={self.increment!r} without an interval; expected the steps from one "
                "increment to the next"
            )
        positive_int("n_samples", self.n_samples)

    def weight_at(self, step: int | None) -> float:
        """Return the weight in a training step; None, where nobody has told it, counts as 0."""
        if not self.increment or self.interval is None:
            return self.weight
        if step is None:
            warn_once(
                "jacobian regularization",
                f"{self!r} was not told the training step and takes it to be 0; call "
                "dpp.set_step(model, step) in the training loop",
                ConvergenceWarning,
            )
            step = 0
        return max(0.0, self.weight + self.increment * (step // self.interval))

    @never_compiled
    def __call__(
        self, func: Callable[[State], State], equilibrium: State, step: int | None = None
    ) -> Tensor | None:
        """Return the term that joins the loss of this step, None where it has none.

        Args:
            func: F, see `dpp.jacobian_reg`.
            equilibrium: h*, detached.
            step: the training step.
        """
        weight = self.weight_at(step)
        # Nothing is drawn where nothing is left to chance: other random numbers stay as they were.
        if weight == 0 or (self.freq < 1 and torch.rand(()).item() >= self.freq):
            return None
        return weight * jacobian_reg(func, equilibrium, self.n_samples)


def _number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}={value!r}; expected a number")
    return value
