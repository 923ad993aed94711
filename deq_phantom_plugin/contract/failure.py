"""What to do when a solve fails."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._plumbing.once import warn_once
from .errors import ConvergenceError, ConvergenceWarning
from .memory import Memory

_counting = threading.Lock()  # replicas in threads share one memory


@dataclass(frozen=True)
class FailurePolicy:
    """What to do when a solve fails; made by `guard`.

    Attributes:
        action: "warn", "raise" or "fallback".
        fallback: the strategy whose gradient the samples that failed get.
        tol: the relative residual of the adjoint system above which a sample has failed.
    """

    action: str
    fallback: Any  # a GradStrategy; their contract is a floor above
    tol: float

    def note(self, kind: str, failed: Tensor, memory: Memory | None, message: str) -> None:
        """Count samples that failed, and warn or raise if that is the policy.

        Args:
            kind: the solve that failed, "forward" or "adjoint".
            failed: the samples in which it failed, shape (B,).
            memory: the memory of the equilibrium, which counts them.
            message: what happened, in words.

        Raises:
            ConvergenceError: if that is the policy.
        """
        n = int(failed.sum())
        if memory is not None:
            with _counting:
                memory.failures[kind] += n
        text = f"{message} in {n} of {failed.numel()} samples"
        if self.action == "raise":
            raise ConvergenceError(f"{text}. Samples: {torch.nonzero(failed).flatten().tolist()}")
        if self.action == "fallback":
            text += f", which get the gradient of {self.fallback!r}"
        else:
            text += (
                ", whose gradient may be wrong. Give the solve more iterations, or these samples "
                "another gradient: on_failure=\"fallback('jfb')\""
            )
        message = f"{text}. dpp.failures(model) counts them. This is said once per run."
        warn_once(f"guard {kind}", message, ConvergenceWarning)
