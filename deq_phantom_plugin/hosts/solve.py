"""`Solve` describes one forward solve to observers, such as monitors and reports.

Hosts attach a strategy to the result of a solve by `attach_observed` or `loop_observed`. Both call
the observers afterwards, through `tell`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .._plumbing.calls import Counted
from .._plumbing.compilation import never_compiled
from .._plumbing.precision import AutocastState
from .._plumbing.trial import Trial
from ..adjoint import Packing, relative_norm
from ..attach import attach
from ..contract.state import State, flatten
from ..contract.strategy import BatchDim, Context, GradStrategy
from ..loop import At, looped


@dataclass(frozen=True, eq=False)
class Solve:
    """One forward solve of an equilibrium in training, as its host saw it; see `Solve.of`.

    Attributes:
        func: F, from a state to a state of the same structure; valid until the parameters change.
        initial_state: the state where the solve began.
        equilibrium: the state where the solve ended, detached; the last one if the framework hands
            out several states.
        attached: the same state with its graph; the model goes on with it.
        strategy: the strategy behind that graph; one that stands for the framework's own gradient
            if no name was given.
        step: the training step, None if unknown.
        nfe: the number of evaluations of F that the solve took, 0 if unknown.
        batch_dim: see `Context.batch_dim`.
        solver_result: see `Context.solver_result`.
        index: the number of the solve among those of the module in one forward pass, from 0.
        known_residual: the relative residual, shape (B,), if the framework's solver gives it.
        total: the length of training in steps, None if unknown.
        place: see `Context.place`.
    """

    func: Callable[[State], State]
    initial_state: State
    equilibrium: State
    attached: State
    strategy: GradStrategy
    step: int | None
    nfe: int
    batch_dim: BatchDim = "auto"
    solver_result: Any = None
    index: int = 0
    known_residual: Tensor | None = None
    total: int | None = None
    place: int | None = None
    _autocast: AutocastState = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_autocast", AutocastState(flatten(self.equilibrium)[0]))

    @classmethod
    def of(
        cls,
        func: Callable[[State], State],
        found: State,
        attached: State,
        strategy: GradStrategy,
        context: Context,
        nfe: int,
        **known: Any,
    ) -> Solve:
        """Return a solve, made of what a host knows.

        A strategy that owns the solve gets the initial state as `found`. The equilibrium is then
        what the strategy returned.

        Args:
            func: F.
            found: the state that the strategy was given, detached.
            attached: the state that the strategy returned.
            strategy: the strategy.
            context: the strategy's context.
            nfe: the number of evaluations of F that the solve took.
            **known: `index` and `known_residual`, if known.
        """
        if strategy.resolve(context).owns_solve:
            found = tree_map(Tensor.detach, attached)
        return cls(
            func,
            context.initial_state,
            found,
            attached,
            strategy,
            context.current_step,
            nfe,
            context.batch_dim,
            context.solver_result,
            total=context.current_total,
            place=context.current_place,
            **known,
        )

    @functools.cached_property
    def residual(self) -> Tensor:
        """||F(h) - h|| / ||F(h)|| per sample, shape (B,); shape (1,) if samples are coupled.

        If the host does not know the residual, the first access evaluates F once, and leaves no
        trace. The first access has to come before the parameters change.
        """
        if self.known_residual is not None:
            return self.known_residual
        with torch.no_grad(), self.trial():
            return relative_residual(self.equilibrium, self.func(self.equilibrium), self.batch_dim)

    @property
    def context(self) -> Context:
        """A context for a strategy on this solve."""
        return Context(
            self.batch_dim,
            self.initial_state,
            solver_result=self.solver_result,
            step=self.step,
            total=self.total,
            place=self.place,
        )

    @contextmanager
    def trial(self) -> Iterator[Trial]:
        """Evaluate F under the autocast of the solve, inside a `with` block; see `Trial`."""
        with Trial(self.equilibrium) as trial, self._autocast():
            yield trial


Observers: TypeAlias = list[tuple[Callable[[Solve], None]]]
"""Callbacks, each in a tuple of its own, so that equal callbacks can be distinguished."""


def add_observer(observers: Observers, callback: Callable[[Solve], None]) -> Callable[[], None]:
    """Add a callback to a list; return a function that removes it again."""
    observation = (callback,)
    observers.append(observation)

    def end() -> None:
        observers[:] = [known for known in observers if known is not observation]

    return end


@never_compiled
def tell(
    observers: Sequence[Callable[[Solve], None]],
    func: Callable[[State], State],
    found: State,
    attached: State,
    strategy: GradStrategy,
    context: Context,
    nfe: int,
    **known: Any,
) -> None:
    """Call observers with the solve that `Solve.of` makes of the other arguments."""
    if observers:
        solve = Solve.of(func, found, attached, strategy, context, nfe, **known)
        for observer in observers:
            observer(solve)


def attach_observed(
    observers: Sequence[Callable[[Solve], None]],
    func: Callable[[State], State],
    found: State,
    strategy: GradStrategy,
    context: Context,
    nfe: int,
    index: int = 0,
    known_residual: Tensor | None = None,
) -> State:
    """Attach a strategy to what a host found, as `dpp.attach` does, and tell observers.

    Args:
        observers: the callbacks that get the solve.
        func: F.
        found: the state where the host's solve ended, detached. For a strategy that owns the solve
            it is the state where the solve begins.
        strategy: the strategy, resolved.
        context: its context, with the initial state.
        nfe: the number of evaluations of F that the host's solve took. The evaluations of a
            strategy that owns the solve are counted here instead.
        index: see `Solve`.
        known_residual: the relative residual of `found`, shape (B,), if the host's solver gives it.

    Returns:
        The state with a graph that yields the strategy's gradient.
    """
    if not observers or not torch.is_grad_enabled():
        return attach(func, found, strategy, context)
    counted = Counted(func)
    attached = attach(counted if strategy.owns_solve else func, found, strategy, context)
    taken = counted.nfe if strategy.owns_solve else nfe
    known = {"index": index, "known_residual": known_residual}
    tell(observers, func, found, attached, strategy, context, taken, **known)
    return attached


def loop_observed(
    observers: Sequence[Callable[[Solve], None]],
    func: Callable[[State], State],
    start: State,
    steps: int,
    strategy: GradStrategy,
    context: Context,
    index: int = 0,
    at: At | None = None,
) -> State:
    """Evaluate a loop as `dpp.loop` does, and tell observers of the state at its end.

    Args:
        observers: the callbacks that get the solve.
        func: F.
        start: the state where the loop begins, which is the context's initial state.
        steps: the number of evaluations.
        strategy: the strategy, resolved.
        context: its context.
        index: see `Solve`.
        at: see `looped`.

    Returns:
        The state at the end of the loop, with a graph that yields the strategy's gradient.
    """
    strategy = strategy.within(steps)
    if not observers or not torch.is_grad_enabled():
        return looped(func, start, steps, strategy, context, at)
    counted = Counted(func)
    acting = counted if strategy.owns_solve else func
    attached = looped(acting, start, steps, strategy, context, at)
    nfe = steps if at is not None or not strategy.owns_solve else counted.nfe
    found = tree_map(Tensor.detach, attached)
    tell(observers, func, found, attached, strategy, context, nfe, index=index)
    return attached


def relative_residual(state: State, image: State, batch_dim: BatchDim) -> Tensor:
    """Return ||F(h) - h|| / ||F(h)|| per sample, shape (B,); shape (1,) if samples are coupled.

    Args:
        state: h.
        image: F(h).
        batch_dim: see `Context.batch_dim`; "auto" counts as 0 here.
    """
    before, after = flatten(state)[0], flatten(image)[0]
    packing = Packing(before, 0 if isinstance(batch_dim, str) else batch_dim)
    h, f = packing.pack(before), packing.pack(after)
    return relative_norm(f - h, f)
