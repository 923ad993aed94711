"""BPTT: autograd through the solve itself."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ..contract.state import State
from ..contract.strategy import Context, GradStrategy
from .depth import Depth, drawn, number_or_depth
from .registry import register_strategy


@register_strategy("bptt")
@dataclass(frozen=True, repr=False)
class BPTT(GradStrategy):
    """Autograd through `steps` iterations h <- F(h) from the initial state.

    The strategy owns the solve: hosts skip theirs. It begins at the context's initial state, or,
    where there is none, at the equilibrium that `dpp.attach` is given. With few steps this is the
    unrolled pretraining with which the experiments of "On Training Implicit Models" begin
    (supplement 4.2). With many steps it is the exact gradient. It can be differentiated to any
    order. The value is the last iterate.

    Costs `steps` evaluations of F with their backward passes. Memory holds `steps` graphs.

    Args:
        steps: the number of iterations, or a distribution of it, see `Depth`.

    Raises:
        ValueError: if `steps` is neither.
    """

    steps: int | Depth | str = 10

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", number_or_depth("steps", self.steps))

    @property
    def owns_solve(self) -> bool:
        """Yes."""
        return True

    @property
    def tells_samples_apart(self) -> bool:
        """No."""
        return False

    def resolve(self, context: Context) -> GradStrategy:
        """Return the strategy with the number of the current step, where that is drawn."""
        depth = self.steps
        return replace(self, steps=depth.draw(context)) if isinstance(depth, Depth) else self

    def attach(self, func: Callable[[State], State], equilibrium: State, context: Context) -> State:
        """See `GradStrategy.attach`."""
        return deque(self.states(func, equilibrium, context), maxlen=1).pop()

    def states(
        self, func: Callable[[State], State], equilibrium: State, context: Context
    ) -> Iterator[State]:
        """Yield the iterates h_1 ... h_steps."""
        state = equilibrium if context.initial_state is None else context.initial_state
        for _ in range(drawn("steps", self.steps)):
            state = func(state)
            yield state
