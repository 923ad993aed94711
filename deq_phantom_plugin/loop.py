"""Loops of a fixed number of evaluations, as in recursive models, with a gradient by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ._plumbing.cached_weights import CachedWeights
from ._plumbing.compilation import compiled
from ._plumbing.lockstep import evaluated, in_lockstep
from ._plumbing.transforms import in_forward_mode
from ._plumbing.whole import Sharded
from .attach import attach, count
from .contract.state import CheckedFunc, State, flatten, unflatten
from .contract.strategy import Context, GradStrategy
from .inspection import settled
from .strategies import BPTT, TBPTT
from .strategies.depth import Depth, number_or_depth
from .strategies.registry import Spec, get_strategy

At = Callable[[int, State], State]
"""Evaluation number i of a loop: (i, state) -> state."""


def loop(
    func: Callable[[State], State],
    state: State,
    steps: int | str,
    grad: Spec = "upg",
    context: Context | None = None,
    *,
    compile: bool | str = False,
) -> State:
    """Evaluate h <- F(h) `steps` times, and attach the named gradient to the last state.

    Recursive models do this by hand: most evaluations run without a graph, and the last one with a
    graph. That is `loop(func, state, steps, "tbptt(k=1)")`. The value depends on the strategy:

    - `tbptt`, `jfb`, `ift`, `exact`, `shine`, `bptt` and `upg` with lam=1.0 have that of the plain
      loop, to the bit. `npg` and `npg_rr` have it too, and evaluate F once more for their graph.
    - `upg(k, lam)` with lam below 1 has that of steps - k evaluations and k damped ones.
    - `reversible` has that of its own iteration.
    - `guard` has that of the strategy inside. Samples that fall back have that of the fallback,
      which goes on from the state at which the strategy inside began.

    Under `torch.no_grad` the value is that of the plain loop. With `tbptt`, `upg`, `jfb` and `bptt`
    the loop compiles into one graph, if `grad` is an object that `get_strategy` made outside of the
    compiled code.

    Args:
        func: F, from a state to a state of the same structure; see `dpp.attach`. The first
            evaluation may bring the state to its final shape and dtype, as from vectors (D,) that
            are learned to states (B, L, D).
        state: where the loop begins: a tensor, or any nesting of tuples, lists and dicts of
            tensors. It may carry a graph. Backward goes through that graph where all evaluations
            carry one (`bptt`, `tbptt('all')`, `upg` with k of at least `steps`, `jfb` where `steps`
            is 1). Otherwise the graph is cut, also by a strategy around another, such as `guard`.
        steps: the number of evaluations, or a distribution of it, see `Depth`. For a distribution
            the context's memory knows the training step, and whether the model is in training.
        grad: the strategy's spec, see `get_strategy`. A k beyond the loop means all of the loop. A
            strategy that owns the solve takes `steps`, unless its spec names a number. An object
            always has a number: `get_strategy("bptt")` has 10 steps.
        context: what else the strategy may know, see `dpp.attach`.
        compile: whether F is compiled for the evaluations, or a mode of `torch.compile`. Strategies
            that take many products run F as it was written.

    Returns:
        A state like that of the last evaluation.

    Raises:
        TypeError: if `context` is no `Context`.
        ValueError: if `steps` is no whole number of at least 1, if the spec is invalid, if its
            strategy evaluates F more often than the loop, or if F returns another structure than it
            was given or, after the first evaluation, another shape.
    """
    depth = number_or_depth("steps", steps)
    if not isinstance(context, Context | None):
        raise TypeError(f"context={context!r:.60}; expected a dpp.Context, such as dpp.Context()")
    context = replace(context or Context(), initial_state=state)
    number = depth.draw(context) if isinstance(depth, Depth) else depth
    strategy = get_strategy(grad, {"steps": number}).resolve(context).within(number)
    return looped(compiled(func, compile), state, number, strategy, context)


def looped(
    func: Callable[[State], State],
    state: State,
    steps: int,
    strategy: GradStrategy,
    context: Context,
    at: At | None = None,
) -> State:
    """Do what `loop` does, with a strategy that is resolved and within the loop.

    Args:
        func: F.
        state: where the loop begins; the context's initial state.
        steps: the number of evaluations.
        strategy: the strategy.
        context: its context.
        at: (i, state) -> state, evaluation number i of the loop, from 0; for loops that do not
            iterate one map. It leads to the state where the strategy begins, which then takes F.
            `tbptt` and `bptt` need no F, and go backwards through these evaluations.
    """
    growing = evaluations(func, at)
    if not (torch.is_grad_enabled() or in_forward_mode()):
        return repeated(growing, state, steps)
    free = 0 if strategy.owns_solve else steps - strategy.steps_ahead
    if free < 0:  # of another package, or one that wraps: `GradStrategy.within` is not theirs
        raise ValueError(
            f"{strategy!r} evaluates F {strategy.steps_ahead} times, in a loop of steps={steps}; "
            f"expected at most {steps}"
        )
    if at is not None and isinstance(strategy, TBPTT | BPTT):
        cut = _without_graph(growing, state, free) if free else state
        count(context)
        return repeated(growing, cut, getattr(strategy, "steps", steps - free))
    unrolls = (strategy.hands_out_states and not strategy.owns_solve) or isinstance(strategy, BPTT)
    if free == 0 and unrolls and at is None:
        return _unrolled(growing, state, strategy, context)
    return attach(func, _without_graph(growing, state, free), strategy, context)


def _unrolled(
    func: Callable[[State], State], state: State, strategy: GradStrategy, context: Context
) -> State:
    """Return a graph of all evaluations, which may go on into the first state's."""
    if not strategy.tells_samples_apart:  # then all processes evaluate F equally often
        count(context)
        return strategy.attach(func, state, settled(context, func, _detached(state), False))
    sharded = Sharded.of(state)
    if sharded is not None:
        func, state = sharded.on_whole(func), sharded.whole(state)
    with in_lockstep(context.process_group, () if sharded is None else sharded.holders):
        context = settled(context, func, _detached(state))
        count(context)
        attached = strategy.attach(func, state, context)
        return attached if sharded is None else sharded.parts(attached)


def evaluations(func: Callable[[State], State], at: At | None = None) -> Callable[[State], State]:
    """Return the map from a loop's state to the state one evaluation later, see `looped`."""
    return Growing(func) if at is None else _Counting(at)


class _Counting:
    """The evaluations of a loop one by one, as a function of the state."""

    def __init__(self, at: At) -> None:
        self._at, self._done = at, 0
        self._weights = CachedWeights()

    def __call__(self, state: State) -> State:
        """Do the next evaluation."""
        self._weights.prepare()
        state = self._at(self._done, state)
        self._done += 1
        return state


def repeated(func: Callable[[State], State], state: State, steps: int) -> State:
    """Return the state after so many evaluations."""
    for _ in range(steps):
        state = func(state)
    return state


def _detached(state: State) -> State:
    leaves, structure = flatten(state)
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise ValueError(
                f"the state holds a {type(leaf).__name__}; expected a tensor, or any nesting of "
                "tuples, lists and dicts of tensors"
            )
    return unflatten([Tensor.detach(leaf) for leaf in leaves], structure)


def _without_graph(evaluate: Callable[[State], State], state: State, steps: int) -> State:
    """Return the state after `steps` evaluations without a graph."""
    with torch.no_grad():
        state = _detached(state)
        if isinstance(evaluate, Growing) and steps > 2:
            # Only the first and the last are checked. The others cost no more than by hand.
            return evaluate(repeated(evaluate.func, evaluate(state), steps - 2))
        return repeated(evaluate, state, steps)


class Growing:
    """F, whose first result may be larger than the state it was given.

    Args:
        func: F.

    Raises:
        ValueError: on a call whose result is no state, or is not like the first result.
    """

    def __init__(self, func: Callable[[State], State]) -> None:
        self.func = self.__wrapped__ = func
        self._checked: CheckedFunc | None = None
        self._weights = CachedWeights()

    def __call__(self, state: State) -> State:
        """Evaluate F."""
        if self._checked is not None:
            return self._checked(state)
        image = evaluated(lambda begin: self._weights.evaluate(self.func, begin), state)
        self._checked = CheckedFunc(self.func, _grown(state, image), self._weights)
        return image


def _grown(state: State, image: State) -> State:
    """Return a first result, if the state may have grown to it."""
    (before, want), (after, got) = flatten(state), flatten(image)
    if got != want:
        raise ValueError(
            f"func returned the structure {got}, but was given {want}; it must map a state to a "
            "state of the same structure, a dict with its keys in the same order"
        )
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        where = f"leaf {index} of what func returned" if len(after) > 1 else "func's result"
        if not isinstance(new, Tensor):
            raise ValueError(f"{where} is a {type(new).__name__}; expected a tensor")
        if not _broadcasts(old.shape, new.shape):
            raise ValueError(
                f"{where} has shape {tuple(new.shape)}, to which the state's {tuple(old.shape)} "
                "does not broadcast"
            )
    return image


def _broadcasts(old: torch.Size, new: torch.Size) -> bool:
    pairs = zip(reversed(old), reversed(new), strict=False)
    return len(old) <= len(new) and all(a in (1, b) for a, b in pairs)
