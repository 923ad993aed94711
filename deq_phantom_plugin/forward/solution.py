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
    """What a quasi-Newton solve learned about (I - J)^-1 on its way.

    Attributes:
        estimate: the estimate, on rows of shape (B, D).
        packing: turns the leaves of a state into rows, and back.
    """

    estimate: InverseEstimate
    packing: Packing

    def transposed(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Return an estimate of (I - J^T)^-1 v, from the leaves of v to leaves like them."""
        return self.packing.unpack(self.estimate.transposed(self.packing.pack(leaves)))


@dataclass(frozen=True)
class ForwardSolution:
    """What a forward solver found.

    Attributes:
        state: the state of lowest residual, sample by sample. It has the structure, shapes and
            dtypes of the initial state.
        sampled: the best states after the evaluations that `sample_at` named.
        abs_lowest: the residual ||F(h) - h|| per sample, shape (B,).
        rel_lowest: ||F(h) - h|| / ||F(h)|| per sample, shape (B,).
        abs_trace: the residual after each of N iterations, shape (B, N + 1). It begins with 1e8.
            Where an iteration was not looked at, it repeats the last look.
        rel_trace: the same of the relative residual.
        n_steps: the iteration in which the lowest residual was found, shape (B,).
        inverse_jacobian: what a quasi-Newton solve with `keep_inverse` has learned; else None.
    """

    state: State
    sampled: list[State]
    abs_lowest: Tensor
    rel_lowest: Tensor
    abs_trace: Tensor
    rel_trace: Tensor
    n_steps: Tensor
    inverse_jacobian: InverseJacobian | None = None
