"""What a patched recursive or recurrent model calls in place of its own loop."""

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

    A `dpp.Equilibrium(steps=...)`, but for three things. While no gradient is named, its own is
    that of evaluation mode too, as in the code that it replaces; a loop that is no iteration of one
    map says what each of its evaluations is; and a model that draws its depth gives the number of
    evaluations with each call, and how many of them it would go back through.

    Args:
        grad: the strategy's spec, see `get_strategy`; None for the model's own.
        steps: the number of evaluations; None where each call brings it.
        own: a spec of what the model does by itself.
        saved: whether the training step is in the model's `state_dict`: a loader that asks a
            checkpoint for every key of the model would refuse those from before the patch.
        batch_dim: see `Context.batch_dim`.

    Attributes:
        grad: the strategy; None may be written too.

    Raises:
        ValueError: if an argument is out of range.
    """

    _models_own: GradStrategy
    _open: Spec | None = None  # a spec that leaves the steps to each call

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
            one, two = (get_strategy(value or "jfb", {"steps": n}) for n in (1, 2))
            self.__dict__["_open"] = value if self.steps is None and one != two else None
        super().__setattr__(name, value)

    @property
    def is_own(self) -> bool:
        """Whether no gradient is named."""
        return self.grad is self._models_own

    def strategy_of(self, spec: Spec | None) -> GradStrategy:
        """Return the strategy that a spec names here, the model's own for None."""
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
            start: where the loop begins.
            at: evaluation number i of the loop, from 0, as (i, state) -> state, where it is no
                iteration of F: see `deq_phantom_plugin.loop.looped`.
            steps: the number of evaluations of this call, 0 or more; None for the module's.
            graph: how many of them, the last, carry the model's own graph; None for what `own`
                says. A gradient that is named does not ask.
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

    @never_compiled  # or for each number of evaluations anew
    def numbered(
        self, evaluate: At, start: State, free: int, graph: int, cache: Any = None
    ) -> tuple[State, State]:
        """Return the state at the end of a loop and the state before its last evaluation.

        For a recurrence whose evaluations count along. F is the last of them; a cache that they
        write to, one entry each, is refused where a gradient evaluates F again.

        Args:
            evaluate: evaluation number i, from 0: (i, state) -> state.
            start: where the loop begins.
            free: how many evaluations the model has without a graph; none if negative.
            graph: how many it has after them with one.
            cache: what evaluations write to, None for nothing.

        Raises:
            ValueError: if there is a cache in training and a gradient is named, or observed.
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
            raise ValueError("steps=None; expected the number of evaluations of this call")
        return super()._number(start)


def _left_out(memory: nn.Module, saved: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Take the step out of a `state_dict` again."""
    del saved[f"{prefix}step"]


@never_compiled
def _of_steps(spec: Spec, number: int) -> GradStrategy:
    return get_strategy(spec, {"steps": number})
