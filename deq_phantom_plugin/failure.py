"""What to do when a solve fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .adjoint.probe import with_probe
from .errors import ConvergenceError, warn_once
from .state import State, flatten

if TYPE_CHECKING:
    from .memory import Memory
    from .strategy import Context, GradStrategy


_counting = threading.Lock()  # replicas in threads share one memory


@dataclass(frozen=True)
class FailurePolicy:
    """What to do when a solve fails; made by `guard`.

    Attributes:
        action: "warn", "raise" or "fallback".
        fallback: whose gradient the samples that failed get.
        tol: the relative residual of the adjoint system above which a sample has failed.
    """

    action: str
    fallback: GradStrategy | None
    tol: float

    def note(self, kind: str, failed: Tensor, memory: Memory | None, message: str) -> None:
        """Count samples that failed, and warn or raise if that is the policy.

        Args:
            kind: "forward" or "adjoint".
            failed: which samples did, shape (B,).
            memory: of the equilibrium, which counts.
            message: what to say of them.

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
        warn_once(f"guard {kind}", f"{text}. dpp.failures(model) counts them; said once.")

    def gradient(
        self,
        func: Callable[[State], State],
        equilibrium: State,
        v: Sequence[Tensor],
        context: Context,
    ) -> list[Tensor]:
        """Return the g of the fallback: (dF/dz)^T g is its gradient.

        Args:
            func: F.
            equilibrium: h*, detached.
            v: the leaves of the gradient that comes in.
            context: what is known.
        """
        assert self.fallback is not None
        with torch.enable_grad():
            probed, probes = with_probe(func, equilibrium)
            told = replace(context, on_failure=None, monitor=None)
            attached = self.fallback.resolve(told).attach(probed, equilibrium, told)
            return list(torch.autograd.grad(flatten(attached)[0], probes, list(v)))
