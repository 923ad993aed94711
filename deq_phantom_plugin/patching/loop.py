"""What a patched recursive model calls in place of its own loop."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..contract.state import State
from ..contract.strategy import GradStrategy
from ..equilibrium import Equilibrium
from ..loop import At
from ..strategies.registry import Spec, get_strategy


class Loop(Equilibrium):
    """A loop of a patched model, whose gradient is the model's own until one is named.

    A `dpp.Equilibrium(steps=...)`, but for two things. While no gradient is named, its own is that
    of evaluation mode too, as in the code that it replaces; and a loop that is no iteration of one
    map says what each of its evaluations is.

    Args:
        grad: the strategy's spec, see `get_strategy`; None for the model's own.
        steps: the number of evaluations.
        own: a spec of what the model does by itself.

    Attributes:
        grad: the strategy; None may be written too.

    Raises:
        ValueError: if an argument is out of range.
    """

    _models_own: GradStrategy

    def __init__(self, grad: Spec | None, steps: int, own: Spec = "tbptt(k=1)") -> None:
        self.__dict__["_models_own"] = get_strategy(own, {"steps": steps})
        super().__init__(grad=grad, steps=steps)  # type: ignore[arg-type]

    def strategy_of(self, spec: Spec | None) -> GradStrategy:
        """Return the strategy that a spec names here, the model's own for None."""
        return self._models_own if spec is None else super().strategy_of(spec)

    def forward(self, func: Callable[[State], State], start: State, at: At | None = None) -> State:
        """Return the state at the end of the loop.

        Args:
            func: F, from a state to a state of the same structure.
            start: where the loop begins.
            at: evaluation number i of the loop, from 0, as (i, state) -> state, where it is no
                iteration of F: see `deq_phantom_plugin.loop.looped`.
        """
        if self.grad is self._models_own and torch.is_grad_enabled():
            return self.looped(func, start, self._number(start), at)
        return self._loop(func, start, tree_map(Tensor.detach, start), at)
