"""The base class of this package's own equilibrium modules, which need no hook.

Such a module solves, or takes a state that was solved for. It then attaches its strategy's gradient
and tells observers of the solve.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..contract.memory import Memory
from ..contract.state import State
from ..contract.strategy import (
    BatchDim,
    Context,
    GradStrategy,
    check_batch_dim,
    check_process_group,
)
from ..loop import At
from ..strategies.arguments import boolean
from ..strategies.registry import Spec, get_strategy
from .evaluation import attaches
from .solve import Observers, Solve, attach_observed, loop_observed


class Attaching(nn.Module):
    """A module without parameters that attaches the gradient of one equilibrium of a model.

    It adds one number to the model's `state_dict`: the step that its memory holds. The size of the
    `state_dict` does not change during training. Checkpoints without the number load, too.

    Args:
        grad: the strategy's spec, see `get_strategy`.
        batch_dim: see `Context.batch_dim`.
        grad_in_eval: whether the gradient is attached in evaluation mode too.
        process_group: see `Context.process_group`.

    Attributes:
        grad: the strategy.
        batch_dim: as given.
        grad_in_eval: as given.
        process_group: as given. A group is not copied or saved.
        memory: see `Memory`.
        observers: callbacks that get each `Solve` in training. They are not copied or saved.
        host: the name of the host that finds the module.

    Raises:
        ValueError: if an argument is invalid.
    """

    host: ClassVar[str] = "own"

    def __init__(
        self,
        grad: Spec,
        batch_dim: BatchDim = "auto",
        grad_in_eval: bool = False,
        process_group: Any = "auto",
    ) -> None:
        super().__init__()
        self.grad: GradStrategy = self.strategy_of(grad)
        check_batch_dim(batch_dim)
        check_process_group(process_group)
        self.batch_dim, self.process_group = batch_dim, process_group
        self.grad_in_eval = boolean("grad_in_eval", grad_in_eval)
        self.memory = Memory()
        self.observers: Observers = []

    def __setattr__(self, name: str, value: Any) -> None:
        new: Any = self.strategy_of(value) if name == "grad" else value
        super().__setattr__(name, new)

    def strategy_of(self, spec: Spec) -> GradStrategy:
        """Return the strategy of a spec; subclasses may add defaults."""
        return get_strategy(spec)

    def context(self, start: State, step: int | None = None) -> Context:
        """Return the context for a strategy.

        Args:
            start: the state where the solve begins.
            step: the training step, if the memory does not know it.
        """
        return Context(
            batch_dim=self.batch_dim,
            initial_state=start,
            step=step,
            memory=self.memory,
            process_group=self.process_group,
        )

    def solving(self, context: Context) -> GradStrategy | None:
        """Return the strategy of the current step if it owns the solve, else None."""
        strategy = self.grad.resolve(context) if attaches(self) else None
        return strategy if strategy is not None and strategy.owns_solve else None

    def attached(
        self,
        func: Callable[[State], State],
        found: State,
        context: Context,
        nfe: int,
        residual: Tensor | None = None,
    ) -> State:
        """Return a state with its gradient attached, and tell observers; see `attach_observed`.

        Args:
            func: F.
            found: the state where a solve ended, detached. A strategy that owns the solve begins at
                the context's initial state instead.
            context: what `context` returned.
            nfe: how many evaluations of F the solve took.
            residual: the relative residual of `found`, shape (B,), if it is known.
        """
        strategy = self.grad.resolve(context)
        if strategy.owns_solve:
            found = tree_map(lambda leaf: leaf.detach(), context.initial_state)
        return attach_observed(
            self._watching(), func, found, strategy, context, nfe, known_residual=residual
        )

    def looped(
        self, func: Callable[[State], State], start: State, steps: int, at: At | None = None
    ) -> State:
        """Return the state after a loop of evaluations, with its gradient, and tell observers.

        Args:
            func: F.
            start: the state where the loop begins.
            steps: the number of evaluations.
            at: see `deq_phantom_plugin.loop.looped`.
        """
        context = self.context(start)
        strategy = self.grad.resolve(context)
        return loop_observed(self._watching(), func, start, steps, strategy, context, at=at)

    def _watching(self) -> list[Callable[[Solve], None]]:
        """Return the callbacks to call now: none in evaluation mode."""
        return [callback for (callback,) in self.observers] if self.training else []

    def __getstate__(self) -> dict[str, Any]:
        # A process group is valid in this run only. A copy finds its own, or is given one.
        group = None if self.process_group is None else "auto"
        return {**self.__dict__, "observers": [], "process_group": group}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Pickles of version 0.1 lack these.
        new = {"grad_in_eval": False, "observers": [], "process_group": "auto"}
        super().__setstate__({**new, **state})

    def extra_repr(self) -> str:
        """Show the strategy."""
        return repr(self.grad)
