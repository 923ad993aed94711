"""Attach a gradient to an equilibrium: all that is needed where no host is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ._plumbing.lockstep import in_lockstep
from ._plumbing.transforms import as_constants, in_forward_mode
from ._plumbing.whole import Sharded
from .contract.finite import check_finite
from .contract.state import CheckedFunc, State, check_equilibrium, flatten, ordinary, unflatten
from .contract.strategy import Context, GradStrategy
from .inspection import settled
from .strategies.registry import Spec, get_strategy


def attach(
    func: Callable[[State], State],
    equilibrium: State,
    grad: Spec = "upg",
    context: Context | None = None,
) -> State:
    """Return the equilibrium attached to autograd: backward yields the named gradient.

    Args:
        func: F, from a state to a state of the same structure, shapes and dtypes. It is
            differentiable in its argument and in all tensors that it captures. It is called under
            autograd, with the state as its only argument.
        equilibrium: h* with h* = F(h*), detached: a tensor, or any nesting of tuples, lists and
            dicts of tensors. A strategy that owns the solve (bptt) begins its solve here.
        grad: the strategy's spec, see `get_strategy`.
        context: what else the strategy may know. By default it is found out whether the samples
            along dimension 0 are independent, if the gradient depends on it. Of the built-in
            strategies that is so for ift, exact, shine, guard, auto, lam="adaptive" and clip. With
            a memory in the context that is asked once, and without one in every call. It costs two
            evaluations of F and some products with its Jacobian (7 for 32 samples).

    Returns:
        A state like the equilibrium. Its values are F(h*) (ift, jfb, exact, shine), h* (npg), or
        the last step (upg, bptt). Under `torch.no_grad` it is the equilibrium as it was given.

    Warns:
        AssumptionWarning: once, if samples turn out to be coupled, F is not the same map each time,
            or the state is far from an equilibrium of F. It is found out with the question of
            samples, so not for strategies that do not ask it.

    Raises:
        TypeError: if `context` is no `Context`.
        ValueError: if the spec is invalid, if the equilibrium carries a graph or holds NaN or Inf,
            or if `func` returns another structure, shape or dtype than it was given. On an
            accelerator the next call refuses a NaN, so that no call waits for the device. Compiled
            code looks at no numbers, and a NaN goes on into the loss.
    """
    strategy = get_strategy(grad)
    context = Context() if context is None else context
    if not isinstance(context, Context):
        raise TypeError(f"context={context!r:.60}; expected a dpp.Context, such as dpp.Context()")
    return attach_strategy(func, equilibrium, strategy, context)


def attach_strategy(
    func: Callable[[State], State],
    equilibrium: State,
    strategy: GradStrategy,
    context: Context,
    on_the_way: bool = False,
) -> State:
    """As `attach`, of a strategy and a context that were checked.

    Args:
        func: see `attach`.
        equilibrium: see `attach`.
        strategy: the strategy.
        context: see `attach`.
        on_the_way: whether the state was asked for on the way of a solve, so that nobody expects an
            equilibrium.
    """
    # Forward mode goes on where autograd is off.
    attaching = torch.is_grad_enabled() or in_forward_mode()
    check_equilibrium(equilibrium, finite=False)
    if not attaching:
        return equilibrium
    sharded = Sharded.of(equilibrium)
    if sharded is None:
        with in_lockstep(context.process_group):
            return _attached(func, equilibrium, strategy, context, on_the_way)
    start = context.initial_state
    told = replace(context, initial_state=None if start is None else sharded.whole(start))
    with in_lockstep(context.process_group, sharded.holders):
        whole = sharded.whole(equilibrium)
        whole_func = sharded.on_whole(func)
        return sharded.parts(_attached(whole_func, whole, strategy, told, on_the_way))


def _attached(
    func: Callable[[State], State],
    equilibrium: State,
    strategy: GradStrategy,
    context: Context,
    on_the_way: bool,
) -> State:
    """Return the equilibrium attached by the strategy of the context's step, checked."""
    acting = strategy.resolve(context)
    if not acting.accepts_nonfinite:
        _check_finite(equilibrium, context)
    state = _ordinary(equilibrium)
    checked = CheckedFunc(func, state)
    judged = on_the_way or not acting.assumes_equilibrium
    context = settled(context, checked, state, acting.tells_samples_apart, judged)
    attached = acting.attach(checked, state, context)
    _check_attached(strategy, attached, state)
    count(context)
    return attached


def attach_states(
    func: Callable[[State], State],
    equilibrium: State,
    strategy: GradStrategy,
    context: Context,
) -> Iterator[State]:
    """Yield the states on the way of a strategy that hands them out. Checks are as in `attach`."""
    check_equilibrium(equilibrium, finite=False)
    _check_finite(equilibrium, context)
    state = _ordinary(equilibrium)
    acting, checked = strategy.resolve(context), CheckedFunc(func, state)
    with in_lockstep(context.process_group):
        context = settled(context, checked, state, acting.tells_samples_apart, judged=True)
    yield from acting.states(checked, state, context)
    count(context)


def _check_finite(equilibrium: State, context: Context) -> None:
    def whose() -> str:
        step, number = context.current_step, context.current_place
        place = "" if number is None else f"number {number} of its model, "
        return f"{place}training step {'not told' if step is None else step}"

    check_finite(flatten(equilibrium)[0], whose)


def count(context: Context) -> None:
    """Tell the memory, if it counts calls, that an equilibrium was attached."""
    if context.memory is not None and context.memory.counts:
        context.memory.count()


def _ordinary(equilibrium: State) -> State:
    """Return the state as a constant. Inference tensors, which autograd cannot save, are copied."""
    leaves, structure = flatten(equilibrium)
    return unflatten([ordinary(x) for x in as_constants(leaves)], structure)


def _check_attached(strategy: GradStrategy, attached: State, state: State) -> None:
    """Refuse a result that is no state like the one that the strategy was given."""
    (leaves, got), (like, want) = flatten(attached), flatten(state)
    if got != want:
        raise ValueError(f"{strategy!r} returned the structure {got}; expected {want}")
    for leaf, model in zip(leaves, like, strict=True):
        if not isinstance(leaf, Tensor):
            raise ValueError(f"{strategy!r} returned {leaf!r:.60}; expected a tensor")
        if leaf.shape != model.shape or leaf.dtype != model.dtype:
            raise ValueError(
                f"{strategy!r} returned shape {tuple(leaf.shape)}, {leaf.dtype}; expected "
                f"{tuple(model.shape)}, {model.dtype}, those of the equilibrium"
            )
