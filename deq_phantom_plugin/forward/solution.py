"""What a forward solve finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..adjoint import Packing
from ..adjoint.inverse_estimate import InverseEstimate
from ..contract.state import State


@dataclass(frozen=True)
class InverseJacobian:
    """What a quasi-Newton solve learned of (I - J)^-1 on its way.

    Attributes:
        estimate: for rows of a packing.
        packing: between rows and the leaves of the state.
    """

    estimate: InverseEstimate
    packing: Packing

    def transposed(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Return an estimate of (I - J^T)^-1 v, for and as the leaves of a state."""
        return self.packing.unpack(self.estimate.transposed(self.packing.pack(leaves)))


@dataclass(frozen=True)
class ForwardSolution:
    """What a forward solver found.

    Attributes:
        state: the state of lowest residual, sample by sample; like the one that was given.
        sampled: the best states after the evaluations that were asked for.
        abs_lowest: ||F(h) - h|| of each sample, shape (B,).
        rel_lowest: ||F(h) - h|| / ||F(h)|| of each sample, shape (B,).
        abs_trace: the residual after each iteration, shape (B, N + 1); 1e8 before the first, and
            that of the last look where there was none.
        rel_trace: the same, relative.
        n_steps: the iteration in which the lowest residual was found, shape (B,).
        inverse_jacobian: of a quasi-Newton solve that was asked to keep it.
    """

    state: State
    sampled: list[State]
    abs_lowest: Tensor
    rel_lowest: Tensor
    abs_trace: Tensor
    rel_trace: Tensor
    n_steps: Tensor
    inverse_jacobian: InverseJacobian | None = None
