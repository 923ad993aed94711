"""TBPTT: autograd through the last evaluations of a loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ..contract.state import State
from ..contract.strategy import Context, GradStrategy
from .depth import Depth, drawn, number_or_depth
from .registry import register_strategy


@register_strategy("tbptt")
@dataclass(frozen=True, repr=False)
class TBPTT(GradStrategy):
    """Truncated backpropagation: the last k evaluations h <- F(h) carry the graph.

    Source: Williams & Peng 1990, "An efficient gradient-based algorithm for on-line training of
    recurrent network trajectories". Recurrent and recursive models know the method by this name. In
    a `dpp.loop` the value is that of the plain loop. The graph of the first state is cut, unless
    all evaluations carry a graph. At an equilibrium it is `upg(k, lam=1.0)`:
    g = sum_{t<k} (J^T)^t v, the Neumann series cut after k terms. That comes near the implicit
    gradient only where rho(J) < 1.

    Costs k evaluations of F with their backward passes. Memory holds k graphs.

    Args:
        k: the number of evaluations, or a distribution of it, see `Depth`; or "all" for
            backpropagation through the whole loop, in loops of a fixed number of steps only.

    Raises:
        ValueError: if `k` is none of these. In `attach`, if `k` is "all" and there is no loop.
    """

    k: int | Depth | str = 1

    def __post_init__(self) -> None:
        if self.k != "all":
            try:
                object.__setattr__(self, "k", number_or_depth("k", self.k))
            except ValueError as error:
                raise ValueError(f"{error}, or 'all'") from None

    @property
    def tells_samples_apart(self) -> bool:
        """No."""
        return False

    @property
    def steps_ahead(self) -> int:
        """`k`, the evaluations."""
        return self._number

    def resolve(self, context: Context) -> GradStrategy:
        """Return the strategy with the number of the current step, where that is drawn."""
        return replace(self, k=self.k.draw(context, "k")) if isinstance(self.k, Depth) else self

    def within(self, steps: int) -> TBPTT:
        """See `GradStrategy.within`."""
        return replace(self, k=steps if self.k == "all" else min(self._number, steps))

    def attach(self, func: Callable[[State], State], equilibrium: State, context: Context) -> State:
        """See `GradStrategy.attach`."""
        return deque(self.states(func, equilibrium, context), maxlen=1).pop()

    def states(
        self, func: Callable[[State], State], equilibrium: State, context: Context
    ) -> Iterator[State]:
        """Yield the k states h_1 ... h_k."""
        state = equilibrium
        for _ in range(self._number):
            state = func(state)
            yield state

    @property
    def _number(self) -> int:
        if self.k == "all":
            raise ValueError(
                f"{self!r} goes through all evaluations of a loop, and here is no loop: use "
                "dpp.loop, or give k a number"
            )
        return drawn("k", self.k)
