"""What the last solve of an `Equilibrium` reached, and that it is said where that is too little."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._plumbing.compilation import never_compiled
from .._plumbing.late_read import LateRead
from .._plumbing.once import warn_once
from .._plumbing.trial import Trial
from ..contract.errors import AssumptionWarning, ConvergenceWarning


@dataclass(frozen=True, eq=False)
class LastSolve:
    """The last solve of an `Equilibrium`; nothing in it carries an autograd graph.

    Attributes:
        residual: ||F(h) - h|| / ||F(h)|| per sample, shape (B,); (1,) where samples are coupled.
            None for a loop of `steps`: ask `dpp.model_report` or `dpp.monitor`.
        nfe: evaluations of F that the solve took for the batch, an integer tensor of shape ().
    """

    residual: Tensor | None
    nfe: Tensor


class Judge:
    """Says once that a solve stopped short, or was another than the one that is trained."""

    def __init__(self) -> None:
        self._late: tuple[torch.device, LateRead] | None = None

    def judge(self, residual: Tensor, tol: float, max_iter: int | None) -> None:
        """Look at a solve's residuals; on a GPU one solve later, without a wait.

        Args:
            residual: of each sample.
            tol: what they were to reach.
            max_iter: the solver's most iterations, None if that is its own matter.

        Warns:
            ConvergenceWarning: once, if one is above.
        """
        if self._late is None or self._late[0] != residual.device:
            self._late = residual.device, LateRead(residual.device)
        left = self._late[1].read(torch.count_nonzero(~(residual <= tol)))
        if left:
            limit = "" if max_iter is None else f" after max_iter={max_iter} iterations"
            warn_once(
                "solve of an Equilibrium",
                f"the forward solve of a dpp.Equilibrium stopped{limit} above tol={tol} in {left} "
                f"of {residual.numel()} samples: `last.residual` says where. Raise max_iter or "
                "tol, or take another solver. This is said once.",
                ConvergenceWarning,
            )

    @never_compiled
    def judge_another(self, trained: Tensor, tol: float | None, grad: Any, solver: Any) -> None:
        """Look at where a strategy that owns the solve has ended, before a solver solves instead.

        Args:
            trained: residuals of the state that was trained last.
            tol: what a solve is to reach.
            grad: the strategy.
            solver: what solves where there is no gradient.

        Warns:
            AssumptionWarning: once, if the strategy has ended above.
        """
        if tol and not Trial.depth() and bool((trained > tol).any()):
            warn_once(
                "another solve of an Equilibrium",
                f"{grad!r} ends at a relative residual of {float(trained.max()):.1e}, above "
                f"tol={tol}; without a gradient {solver!r} solves instead, and finds "
                "another state than the one that is trained. To evaluate the same state, let "
                "`solver` be a function of as many steps (docs/howto/loop.md). This is said once.",
                AssumptionWarning,
            )
