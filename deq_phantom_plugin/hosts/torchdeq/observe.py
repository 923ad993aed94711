"""Observes the forward passes of TorchDEQ's cores by hooks on the module, and tells of each solve.

The hooks work without `dpp.enable`, also on cores whose gradient is TorchDEQ's own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..._plumbing.compilation import never_compiled
from ...contract.memory import Memory
from ...contract.state import State
from ...contract.strategy import Context
from ..solve import Solve, tell
from .core import Observed, batch_dim, func_and_start, n_equilibria, solves_at_once, with_func
from .entries import strategy_of
from .form import evaluate, map_leaves


def observe(module: nn.Module, callback: Callable[[Solve], None]) -> Callable[[], None]:
    """Call `callback` after each solve of a core in training; return a function that ends this."""

    def before(deq: Any, args: Any, kwargs: Any) -> Any:
        return with_func(args, kwargs, Observed)

    def after(deq: Any, args: Any, kwargs: Any, output: Any) -> Any:
        if not (deq.training and torch.is_grad_enabled()):
            return None
        states, info = output
        if not states:  # so it is if each entry has fewer steps than sup_gap
            return None
        # Observers get a view of the last state. A gradient at the state itself would be wrong with
        # hook_ift: TorchDEQ's hook has already turned v into g there.
        last = map_leaves(lambda leaf: leaf.view_as(leaf), states[-1])
        _tell(callback, deq, len(states), args, kwargs, last, info)
        return [*states[:-1], last], info

    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]

    def end() -> None:
        for handle in handles:
            handle.remove()

    return end


@never_compiled
def _tell(
    callback: Callable[[Solve], None],
    deq: Any,
    n_states: int,
    args: Any,
    kwargs: Any,
    attached: State,
    info: Any,
) -> None:
    """Call an observer with the solve of the last state.

    Args:
        callback: the observer.
        deq: the core.
        n_states: how many states the core handed out.
        args: the arguments of its `forward`.
        kwargs: its keyword arguments.
        attached: the last state, with its gradient.
        info: TorchDEQ's statistics of the solve.
    """
    counted, start = func_and_start(args, kwargs)
    assert isinstance(counted, Observed)
    producer = counted.producer or _last_producer(deq.produce_grad, n_states)
    strategy = strategy_of(producer, deq.no_stat)
    steps = [m.step for m in deq.modules() if isinstance(m, Memory) and m.step is not None]
    context = Context(
        batch_dim=batch_dim(deq),
        initial_state=start if isinstance(start, Tensor) else list(start),
        solver_result=counted.solver_result,
        step=steps[0] if steps else None,
    )
    residual = info["rel_lowest"].detach()
    # The residual is not known in three cases: if it is -1, TorchDEQ's "not known"; if a strategy
    # owned the solve; and if DEQIndexing hands out several states, since its solve may have ended
    # between two sampled steps.
    owned, sampled = strategy.resolve(context).owns_solve, n_equilibria(deq) > 1
    known = not owned and not (sampled and solves_at_once(deq)) and bool((residual >= 0).all())
    tell(
        [callback],
        functools.partial(evaluate, counted.func),
        map_leaves(Tensor.detach, attached),
        attached,
        strategy,
        context,
        counted.nfe,
        known_residual=residual if known else None,
    )


def _last_producer(producers: Sequence[Any], n_states: int) -> Any:
    """Return the one of TorchDEQ's own producers that handed out the last of the states.

    A producer hands out several states if `sup_gap` or `sup_loc` is set. So this counts them.
    """
    for producer in producers:
        known = inspect.getclosurevars(producer).nonlocals if inspect.isfunction(producer) else {}
        if "sup_gap" in known:
            n_states -= known["n_grad_step"] // known["sup_gap"]
        elif "sup_loc" in known:
            reached = range(1, known["n_grad_step"] + 1)
            n_states -= 1 + len(set(known["sup_loc"]).intersection(reached))
        else:
            n_states -= 1
        if n_states <= 0:
            break
    return producer
