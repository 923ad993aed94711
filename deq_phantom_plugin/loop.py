"""A loop that evaluates F a fixed number of times, with a gradient that is chosen by name.

Recursive models and looped language models have such a loop. `loop` runs its first evaluations
without a graph. It then attaches the named strategy to the state that it has reached, so that the
strategy makes the last evaluations. Hosts call `looped` for the loops of their frameworks.
"""

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

    - `tbptt`, `jfb`, `ift`, `exact`, `shine`, `bptt` and `upg` with lam=1.0 return the value of the
      plain loop, to the bit. So do `npg` and `npg_rr`, which evaluate F once more for their graph.
    - `upg(k, lam)` with lam below 1 makes steps - k evaluations, and then k damped ones.
    - `reversible` returns the value of its own iteration.
    - `guard` returns the value of the strategy inside. Samples that fall back get the value of the
      fallback, which goes on from the state at which the strategy inside began.

    Under `torch.no_grad` the value is that of the plain loop. With `tbptt`, `upg`, `jfb` and `bptt`
    the loop compiles into one graph, if `grad` is an object that `get_strategy` made outside of the
    compiled code.

    Args:
        func: F, from a state to a state of the same structure; see `dpp.attach`. The first
            evaluation may bring the state to its final shape and dtype, as from vectors (D,) that
            are learned to states (B, L, D).
        state: where the loop begins: a tensor, or any nesting of tuples, lists and dicts of
            tensors. It may carry a graph. Backward goes on into that graph where all evaluations
            have one (`bptt`, `tbptt('all')`, `upg` with k of at least `steps`, `jfb` where `steps`
            is 1). Otherwise the graph is cut, also by a strategy around another, such as `guard`.
        steps: the number of evaluations, or a distribution of it, see `Depth`. For a distribution
            the context's memory knows the training step, and whether the model is in training.
        grad: the strategy's spec, see `get_strategy`. A k above `steps` means the whole loop. A
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
    """Do what `loop` does, with a strategy that is resolved, and bounded by `within(steps)`.

    Args:
        func: F.
        state: where the loop begins; the context's initial state.
        steps: the number of evaluations.
        strategy: the strategy.
        context: its context.
        at: (i, state) -> state, evaluation number i of the loop, from 0; for loops that do not
            iterate one map. It makes the evaluations up to the state where the strategy begins.
            From there on the strategy evaluates F. `tbptt` and `bptt` need no F: they go backwards
            through the evaluations of `at`.
    """
    growing = evaluations(func, at)
    if not (torch.is_grad_enabled() or in_forward_mode()):
        return repeated(growing, state, steps)
    free = 0 if strategy.owns_solve else steps - strategy.steps_ahead
    if free < 0:  # a strategy of another package, or around another, may not define `within`
        raise ValueError(
            f"{strategy!r} evaluates F {strategy.steps_ahead} times, in a loop of steps={steps}; "
            f"expected at most {steps}: make the loop longer, or give the strategy fewer steps"
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
    """Return the last state with a graph of all evaluations; the first state's graph is not cut."""
    # Then F need not be inspected, and all processes evaluate it equally often.
    if not strategy.tells_samples_apart:
        count(context)
        return strategy.attach(func, state, settled(context, func, _detached(state), False))
    sharded = Sharded.of(state)
    if sharded is not None:
        func, state = sharded.on_whole(func), sharded.whole(state)
    with in_lockstep(context.process_group, () if sharded is None else sharded.holders):
        context = settled(context, func, _detached(state), judged=True)
        count(context)
        attached = strategy.attach(func, state, context)
        return attached if sharded is None else sharded.parts(attached)


def evaluations(func: Callable[[State], State], at: At | None = None) -> Callable[[State], State]:
    """Return the map that makes the loop's next evaluation; see `looped` for the arguments."""
    return Growing(func) if at is None else _Counting(at)


class _Counting:
    """A function of the state that makes the loop's evaluations one after the other."""

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
    """Return the state without its graph.

    Raises:
        ValueError: if a leaf is not a tensor.
    """
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
            # Checks take time. So only the first and the last evaluation are checked.
            return evaluate(repeated(evaluate.func, evaluate(state), steps - 2))
        return repeated(evaluate, state, steps)


class Growing:
    """F, whose first result may have a larger shape than the state that F was given.

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
    """Return F's first result.

    Raises:
        ValueError: if it has another structure than the state, or the state does not broadcast to
            it.
    """
    (before, want), (after, got) = flatten(state), flatten(image)
    if got != want:
        raise ValueError(
            f"func returned the structure {got}, but was given {want}; expected the structure that "
            "it was given, with the keys of a dict in the same order"
        )
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        where = f"leaf {index} of what func returned" if len(after) > 1 else "func's result"
        if not isinstance(new, Tensor):
            raise ValueError(f"{where} is a {type(new).__name__}; expected a tensor")
        if not _broadcasts(old.shape, new.shape):
            raise ValueError(
                f"{where} has shape {tuple(new.shape)}, to which the state's {tuple(old.shape)} "
                "does not broadcast; expected the state's shape, or one to which it broadcasts"
            )
    return image


def _broadcasts(old: torch.Size, new: torch.Size) -> bool:
    pairs = zip(reversed(old), reversed(new), strict=False)
    return len(old) <= len(new) and all(a in (1, b) for a, b in pairs)
