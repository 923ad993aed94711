"""What the models return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .label_smoothing import OutputTuple
from .solve import EquilibriumInfo

__all__ = ["DEQCausalLMOutput", "DEQModelOutput"]


@dataclass
class DEQModelOutput(BaseModelOutputWithPast):
    """What a `DEQTransformerModel` returns.

    Attributes:
        jac_loss: the weighted Jacobian regulariser of this step, a differentiable scalar; None
            outside training, and in steps that have none.
        equilibrium_info: residual and evaluations of the forward solve.
    """

    jac_loss: Tensor | None = None
    equilibrium_info: EquilibriumInfo | None = None


@dataclass
class DEQCausalLMOutput(CausalLMOutputWithPast):
    """What a `DEQTransformerForCausalLM` returns.

    Attributes:
        loss: cross-entropy, with `jac_loss` added.
        jac_loss: the weighted Jacobian regulariser in this loss; None outside training, and in
            steps that have none.
        equilibrium_info: residual and evaluations of the forward solve.
    """

    jac_loss: Tensor | None = None
    equilibrium_info: EquilibriumInfo | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """Return all that is not None; a `Trainer` with smoothed labels still knows what it was."""
        return OutputTuple.of(self, super().to_tuple())
