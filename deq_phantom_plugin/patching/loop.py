"""What a patched recursive or recurrent model calls in place of its own loop.

`Loop` evaluates F a given number of times, and attaches the gradient of a strategy to the last
state. As long as no gradient is named, it differentiates the evaluations that the model's own code
would differentiate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .._plumbing.compilation import never_compiled
from ..contract.state import State
from ..contract.strategy import BatchDim, GradStrategy
from ..equilibrium import Equilibrium
from ..forward import LastSolve
from ..hosts.evaluation import attaches
from ..hosts.recurrence import Recurrence, refuse_cache
from ..hosts.solve import loop_observed
from ..loop import At
from ..strategies import TBPTT
from ..strategies.registry import Spec, get_strategy


class Loop(Equilibrium):
    """A loop of a patched model, whose gradient is the model's own until one is named.

    It is a `dpp.Equilibrium(steps=...)` with three differences:

    - As long as no gradient is named, the model's own gradient is attached in evaluation mode too,
      as in the code that this module replaces.
    - A loop that does not iterate one map passes `at`, which computes each of its evaluations.
    - A model that draws its depth passes the number of evaluations with each call, and how many of
      them carry its own graph.

    Args:
        grad: the spec of the strategy, see `get_strategy`; None for the model's own gradient.
        steps: the number of evaluations; None if each call passes it.
        own: a spec that describes the model's own gradient.
        saved: whether the training step is saved in the model's `state_dict`. Pass False if the
            model is loaded by code that demands every key of the model in a checkpoint: that code
            would refuse checkpoints from before the patch.
        batch_dim: see `Context.batch_dim`.

    Attributes:
        grad: the strategy. It may be set to None, which selects the model's own gradient.

    Raises:
        ValueError: if an argument is out of range.
    """

    _models_own: GradStrategy
    _open: Spec | None = None  # the spec, if its strategy depends on the steps of each call

    def __init__(
        self,
        grad: Spec | None,
        steps: int | None = None,
        own: Spec = "tbptt(k=1)",
        saved: bool = True,
        batch_dim: BatchDim = "auto",
    ) -> None:
        self.__dict__["_models_own"] = get_strategy(own, {"steps": steps or 1})
        super().__init__(grad=grad, steps=steps, batch_dim=batch_dim)  # type: ignore[arg-type]
        self.grad = grad  # type: ignore[assignment]  # as a spec, not as what it names
        if not saved:
            self.memory.register_state_dict_post_hook(_left_out)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "grad":
            # If the strategy differs between 1 and 2 steps, it depends on their number.
            one, two = (get_strategy(value or "jfb", {"steps": n}) for n in (1, 2))
            self.__dict__["_open"] = value if self.steps is None and one != two else None
        super().__setattr__(name, value)

    @property
    def is_own(self) -> bool:
        """Whether no gradient is named."""
        return self.grad is self._models_own

    def strategy_of(self, spec: Spec | None) -> GradStrategy:
        """Return the strategy that a spec names here, or the model's own if the spec is None."""
        return self._models_own if spec is None else super().strategy_of(spec)

    def forward(  # type: ignore[override]  # a loop has no warm start
        self,
        func: Callable[[State], State],
        start: State,
        at: At | None = None,
        *,
        steps: int | None = None,
        graph: int | None = None,
    ) -> State:
        """Return the state at the end of the loop.

        Args:
            func: F, from a state to a state of the same structure.
            start: the state at which the loop begins.
            at: computes evaluation number i, counted from 0, as (i, state) -> state. Pass it if the
                loop does not iterate F, see `deq_phantom_plugin.loop.looped`.
            steps: the number of evaluations of this call, 0 or more; None for the module's number.
            graph: how many of the last evaluations carry the model's own graph; None for the
                number that `own` says. It has no effect if a gradient is named.

        Raises:
            ValueError: if neither this call nor the module has a number of evaluations.
        """
        number = self._number(start) if steps is None else int(steps)
        if number == 0:
            return start
        self.last = LastSolve(None, torch.tensor(number))
        strategy, attached = self.grad, attaches(self)
        if self.is_own:
            attached = torch.is_grad_enabled() and graph != 0
            strategy = TBPTT(graph) if graph else strategy
        elif self._open is not None:
            strategy = _of_steps(self._open, number)
        if not attached:
            return self._plain(func, start, number, at)
        context = self.context(start)
        return loop_observed(
            self._watching(), func, start, number, strategy.resolve(context), context, at=at
        )

    @never_compiled  # it would be compiled again for each number of evaluations
    def numbered(
        self, evaluate: At, start: State, free: int, graph: int, cache: Any = None
    ) -> tuple[State, State]:
        """Return the state at the end of a loop, and the state before its last evaluation.

        This is for a recurrence whose evaluations depend on their number. The last evaluation is
        the map F of the gradient. A strategy may evaluate F again, which would write to a cache
        once more. So a cache is refused if a gradient is named or observed.

        Args:
            evaluate: computes evaluation number i, counted from 0: (i, state) -> state.
            start: the state at which the loop begins.
            free: the number of evaluations without a graph; a negative number counts as 0.
            graph: the number of evaluations with a graph, which follow them.
            cache: what the evaluations write to, one entry each; None if there is none.

        Raises:
            ValueError: if there is a cache in training, and a gradient is named or observed.
        """
        carrying = max(int(graph), 0)
        steps = max(int(free), 0) + carrying
        if steps == 0:
            return start, start
        refuse_cache(cache, bool(self._watching()) or (attaches(self) and not self.is_own))
        recurrence = Recurrence(evaluate, steps)
        end = self(recurrence.func, start, recurrence.at, steps=steps, graph=carrying)
        return end, recurrence.before

    def _number(self, start: State) -> int:
        if self.steps is None:
            raise ValueError(
                "steps=None; expected the number of evaluations of this call, since this Loop was "
                "made without one"
            )
        return super()._number(start)


def _left_out(memory: nn.Module, saved: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Remove the training step from a `state_dict`; a hook of `Loop(saved=False)`."""
    del saved[f"{prefix}step"]


@never_compiled
def _of_steps(spec: Spec, number: int) -> GradStrategy:
    """Return the strategy of a spec for a loop with this number of evaluations."""
    return get_strategy(spec, {"steps": number})
