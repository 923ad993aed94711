"""JFB: Jacobian-free backpropagation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..contract.state import State
from ..contract.strategy import Context, GradStrategy
from .registry import register_strategy


@register_strategy("jfb")
@dataclass(frozen=True, repr=False)
class JFB(GradStrategy):
    """One step of F from the detached h*: g = v, as if (I - J^T)^-1 were the identity.

    Source: Fung et al. 2022, "JFB: Jacobian-Free Backpropagation for Implicit Networks". It equals
    UPG and NPG with k = 1 and lam = 1. The value is F(h*). Costs one evaluation of F and one
    backward pass. Memory holds one graph.
    """

    @property
    def tells_samples_apart(self) -> bool:
        """No."""
        return False

    def attach(self, func: Callable[[State], State], equilibrium: State, context: Context) -> State:
        """See `GradStrategy.attach`."""
        return func(equilibrium)

    def states(
        self, func: Callable[[State], State], equilibrium: State, context: Context
    ) -> Iterator[State]:
        """Yield the one state."""
        yield self.attach(func, equilibrium, context)
