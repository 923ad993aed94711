"""What equilibria have in common whose gradient is this package's own: no framework is hooked."""

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
    """A module without parameters that attaches one equilibrium of a model by name.

    It adds one number to the model's `state_dict`, the step of its memory, the same all through
    training; checkpoints without it load.

    Args:
        grad: the strategy's spec, see `get_strategy`.
        batch_dim: see `Context.batch_dim`.
        grad_in_eval: whether it attaches in evaluation mode too.
        process_group: see `Context.process_group`.

    Attributes:
        grad: the strategy.
        batch_dim: as it was given.
        grad_in_eval: as it was given.
        process_group: as it was given; a group is not copied or saved.
        memory: see `Memory`.
        observers: what is called with each `Solve` in training; not copied or saved.
        host: the name of the host that finds it.

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
        """Return the strategy that a spec names here."""
        return get_strategy(spec)

    def context(self, start: State, step: int | None = None) -> Context:
        """Return what a strategy is told.

        Args:
            start: where the solve begins.
            step: the training step, where the memory does not have it.
        """
        return Context(
            batch_dim=self.batch_dim,
            initial_state=start,
            step=step,
            memory=self.memory,
            process_group=self.process_group,
        )

    def solving(self, context: Context) -> GradStrategy | None:
        """Return the strategy of the current step if it is to find the equilibrium itself."""
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
        """Attach the strategy to what was found, and tell observers; see `attach_observed`.

        Args:
            func: F.
            found: the state that a solve ended in, detached; not looked at by a strategy that owns
                the solve, which begins at the context's initial state.
            context: of `context`.
            nfe: evaluations of F that the solve took.
            residual: of what was found, where it is known.
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
        """Return the state after a loop of evaluations, attached, and tell observers of it.

        Args:
            func: F.
            start: where the loop begins.
            steps: the number of evaluations.
            at: see `deq_phantom_plugin.loop.looped`.
        """
        context = self.context(start)
        strategy = self.grad.resolve(context)
        return loop_observed(self._watching(), func, start, steps, strategy, context, at=at)

    def _watching(self) -> list[Callable[[Solve], None]]:
        return [callback for (callback,) in self.observers] if self.training else []

    def __getstate__(self) -> dict[str, Any]:
        # Groups are of this run; a copy finds its own out, or is told.
        group = None if self.process_group is None else "auto"
        return {**self.__dict__, "observers": [], "process_group": group}

    def __setstate__(self, state: dict[str, Any]) -> None:
        new = {
            "grad_in_eval": False,
            "observers": [],
            "process_group": "auto",
        }  # pickles of 0.1 lack them
        super().__setstate__({**new, **state})

    def extra_repr(self) -> str:
        """Show the strategy."""
        return repr(self.grad)
