"""What this host's files share: settings of TorchDEQ's cores, and the running forward passes.

A core is a `DEQSliced` or a `DEQIndexing`. `Call` holds what one forward pass of a core knows, for
each thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..._plumbing.calls import Counted
from ...contract.state import State
from ...contract.strategy import BatchDim


def batch_dim(deq: Any) -> BatchDim:
    """Return the `grad_batch_dim` of a core, see `Context.batch_dim`."""
    told: BatchDim = getattr(deq, "grad_batch_dim", "auto")
    return told


def process_group(deq: Any) -> Any:
    """Return the `grad_process_group` of a core, see `Context.process_group`."""
    return getattr(deq, "grad_process_group", "auto")


def n_equilibria(deq: Any) -> int:
    """Return how many states a core samples, each with a gradient of its own."""
    return len(deq.indexing)


def solves_at_once(deq: Any) -> bool:
    """Whether one solve hands out all states (`DEQIndexing`); else there is one solve per state."""
    from torchdeq.core import DEQIndexing

    return isinstance(deq, DEQIndexing)


def func_and_start(args: Any, kwargs: Any) -> tuple[Callable[..., Any], State]:
    """Return F and the initial state, the first two arguments of a core's `forward`."""
    given = [*args, *(kwargs[name] for name in ("func", "z_init", "z_star") if name in kwargs)]
    if len(given) < 2:
        raise TypeError(
            f"a core was called with {len(given)} of its first two arguments; expected func and an "
            "initial state, as in deq(func, z_init)"
        )
    return given[0], given[1]


def with_func(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Any], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a core's `forward`, with F replaced by `change(F)`."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, ({**kwargs, "func": change(kwargs["func"])} if "func" in kwargs else kwargs)


class Observed(Counted):
    """F in a forward pass that is observed.

    Attributes:
        solver_result: the result of the latest solve.
        producer: the entry of `produce_grad` that attached the latest state.
    """

    solver_result: Any = None
    producer: Any = None


@dataclass
class Call:
    """What one forward pass knows and TorchDEQ does not pass to `produce_grad`.

    Attributes:
        z_init: the initial state, in the user's form.
        in_eval: whether a gradient is attached although the core is in evaluation mode.
        solves: how many solves there were.
        initial_states: the initial state of each sampled state's solve.
        infos: the result of each sampled state's solve.
        entries: for each state that a DEQIndexing handed out, the index of its entry in
            `produce_grad`.
        left_out: whether the last state that a DEQIndexing handed out is one on the way.
    """

    z_init: State
    in_eval: bool = False
    solves: int = 0
    initial_states: list[State] = field(default_factory=list)
    infos: list[Any] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)
    left_out: bool = False


class Calls(threading.local):
    """The forward passes that run in this thread, by the id of their core."""

    def __init__(self) -> None:
        self.by_deq: dict[int, Call] = {}


calls = Calls()
