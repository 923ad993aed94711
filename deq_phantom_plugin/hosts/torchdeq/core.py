"""TorchDEQ's two cores: what is read off them, and what is known of a forward pass."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..._plumbing.calls import Counted
from ...contract.state import State
from ...contract.strategy import BatchDim


def batch_dim(deq: Any) -> BatchDim:
    """Return what an equilibrium says of its samples, see `Context.batch_dim`."""
    told: BatchDim = getattr(deq, "grad_batch_dim", "auto")
    return told


def process_group(deq: Any) -> Any:
    """Return the processes among which F communicates, see `Context.process_group`."""
    return getattr(deq, "grad_process_group", "auto")


def n_equilibria(deq: Any) -> int:
    """Return how many states are sampled, each with a gradient of its own."""
    return len(deq.indexing)


def solves_at_once(deq: Any) -> bool:
    """Whether one solve hands out all states; else there is a solve for each, and none missing."""
    from torchdeq.core import DEQIndexing

    return isinstance(deq, DEQIndexing)


def func_and_start(args: Any, kwargs: Any) -> tuple[Callable[..., Any], State]:
    """Return F and the initial state, the first two arguments of a core's `forward`."""
    given = [*args, *(kwargs[name] for name in ("func", "z_init", "z_star") if name in kwargs)]
    if len(given) < 2:
        raise TypeError("expected func and an initial state, as in deq(func, z_init)")
    return given[0], given[1]


def with_func(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Any], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a core's `forward` with another F."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, ({**kwargs, "func": change(kwargs["func"])} if "func" in kwargs else kwargs)


class Observed(Counted):
    """F in a forward pass that is observed.

    Attributes:
        solver_result: how its solve ended.
        producer: the entry of `produce_grad` that attached the state that it ended in.
    """

    solver_result: Any = None
    producer: Any = None


@dataclass
class Call:
    """What one forward pass knows that TorchDEQ does not hand to `produce_grad`.

    Attributes:
        z_init: the initial state, in the user's form.
        in_eval: whether it attaches in evaluation mode.
        solves: how many there were.
        initial_states: where each sampled state's solve began.
        infos: how it ended.
        entries: which entry of `produce_grad` each state has that DEQIndexing hands out.
    """

    z_init: State
    in_eval: bool = False
    solves: int = 0
    initial_states: list[State] = field(default_factory=list)
    infos: list[Any] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)


class Calls(threading.local):
    """The forward passes that this thread is in."""

    def __init__(self) -> None:
        self.by_deq: dict[int, Call] = {}


calls = Calls()
