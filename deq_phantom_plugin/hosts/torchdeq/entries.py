"""The entries of TorchDEQ's `produce_grad`, which attach the gradient of each sampled state.

TorchDEQ calls one entry for each state that a core hands out. `ProduceGrad` is the entry of a named
strategy, and `ProduceSteps` that of an integer among names. `HostGrad` presents TorchDEQ's own
gradient as a strategy, for observers.
"""

from __future__ import annotations

import functools
import inspect
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..._plumbing.once import warn_once
from ...attach import attach_states, attach_strategy
from ...contract.errors import AssumptionWarning
from ...contract.state import State
from ...contract.strategy import BackwardStats, Context, GradStrategy
from .core import (
    Call,
    Observed,
    batch_dim,
    calls,
    n_equilibria,
    process_group,
    solves_at_once,
)
from .form import Form, map_leaves


@dataclass(frozen=True)
class Entry(ABC):
    """An entry of TorchDEQ's `produce_grad`, if there are names in the `grad`.

    TorchDEQ calls the first entry for the first state, and so on. That state may belong to another
    entry, see `Call.entries`. So the entry that is called passes on to the right one.

    Attributes:
        index: the number of the sampled state that the entry is for, from 0.
    """

    index: int

    def __call__(
        self, deq: Any, deq_func: Any, z: State, writer: Any = None, **kwargs: Any
    ) -> list[Any]:
        """Return the sampled state, or states, with a gradient, in the form of TorchDEQ's solve."""
        call = calls.by_deq.get(id(deq))
        if call is not None and len(call.infos) <= self.index:  # the host was disabled meanwhile
            call = None
        entry = self
        if call is not None and call.entries:
            entry = deq.produce_grad[call.entries[self.index]]
        elif call is None and solves_at_once(deq) and differ(deq.produce_grad):
            warn_once(
                "entries without a host",
                "the host torchdeq is not enabled: if a solver stops early, DEQIndexing gives "
                "states the gradients of other states. Call dpp.enable()",
                AssumptionWarning,
            )
        if isinstance(entry, ProduceGrad):  # observers get the strategy of the current step
            acting = entry.current(deq)
            if acting is not entry.strategy:
                entry = replace(entry, strategy=acting)
        states = entry.produce(call, deq, deq_func, z, writer)
        counted = getattr(deq_func, "func", None)
        if states and isinstance(counted, Observed):
            counted.producer = entry
        return states

    @abstractmethod
    def produce(
        self, call: Call | None, deq: Any, deq_func: Any, z: State, writer: Any
    ) -> list[Any]:
        """Return the states of this entry.

        Args:
            call: the forward pass; None if the host is not enabled.
            deq: the core.
            deq_func: F, in TorchDEQ's form.
            z: the state where the solve ended, in TorchDEQ's form.
            writer: TorchDEQ's `backward_writer`, or None.
        """


@dataclass(frozen=True)
class ProduceSteps(Entry):
    """The entry of an integer among names: TorchDEQ's own phantom gradient.

    Attributes:
        steps: the number of its steps.
        sup_gap: TorchDEQ's setting of that name.
        sup_loc: TorchDEQ's setting of that name.
        tau: TorchDEQ's setting of that name.
    """

    steps: int
    sup_gap: int
    sup_loc: tuple[int, ...]
    tau: float

    @property
    def function(self) -> Callable[..., list[Any]]:
        """The function that TorchDEQ makes of the integer."""
        from torchdeq.grad import backward_factory

        function: Callable[..., list[Any]] = backward_factory(
            grad_type=self.steps, tau=self.tau, sup_gap=self.sup_gap, sup_loc=self.sup_loc
        )
        return function

    def produce(
        self, call: Call | None, deq: Any, deq_func: Any, z: State, writer: Any
    ) -> list[Any]:
        """See `Entry.produce`."""
        return self.function(deq, deq_func, z, writer=writer)


@dataclass(frozen=True)
class ProduceGrad(Entry):
    """The entry of a named strategy.

    Attributes:
        strategy: the strategy.
        sup_gap: TorchDEQ's setting: every `sup_gap`-th step hands out its state; below 1 it is off.
        sup_loc: TorchDEQ's setting: the numbers of the steps that hand out their states.
    """

    strategy: GradStrategy
    sup_gap: int
    sup_loc: tuple[int, ...]

    def current(self, deq: Any) -> GradStrategy:
        """Return the strategy of the current step."""
        return self.strategy.resolve(Context(memory=deq.grad_memory[self.index]))

    def produce(
        self, call: Call | None, deq: Any, deq_func: Any, z: State, writer: Any
    ) -> list[Any]:
        """See `Entry.produce`."""
        if call is None and self.current(deq).owns_solve:
            raise RuntimeError(
                f"{self.strategy!r} owns the solve, and TorchDEQ leaves the solve to a strategy "
                "only while the host torchdeq is enabled. Call dpp.enable()"
            )
        form = Form(deq_func)
        context = Context(
            batch_dim=batch_dim(deq),
            initial_state=None if call is None else form.unpack(call.initial_states[self.index]),
            solver_result=None if call is None else call.infos[self.index],
            monitor=None if writer is None else functools.partial(report, writer),
            memory=deq.grad_memory[self.index],
            process_group=process_group(deq),
        )
        state = form.unpack(z)
        if torch.is_grad_enabled() and (self.sup_gap > 0 or self.sup_loc):
            states = attach_states(form.func, state, self.strategy, context)
            return [form.pack(state) for state in self._sampled(states)]
        # A core hands out further states of its solve if it is asked to; the last one is h*.
        left_out = call is not None and call.left_out
        on_the_way = left_out or self.index < n_equilibria(deq) - 1
        attached = attach_strategy(form.func, state, self.strategy, context, on_the_way)
        return [form.pack(attached)]

    def _sampled(self, states: Iterator[State]) -> Iterator[State]:
        """Yield the states that TorchDEQ's own phantom gradient would hand out."""
        state = None
        for step, state in enumerate(states, start=1):
            if self.sup_gap > 0:
                if step % self.sup_gap == 0:
                    yield state
            elif step in self.sup_loc:
                yield state
        if self.sup_gap <= 0:
            yield state


def differ(producers: Sequence[Any]) -> bool:
    """Whether entries of a `grad` with names differ from one another."""
    alike = [replace(entry, index=0) for entry in producers if isinstance(entry, Entry)]
    return any(entry != alike[0] for entry in alike)


def strategy_of(producer: Callable[..., list[Any]], no_stat: bool) -> GradStrategy:
    """Return the strategy behind an entry of `produce_grad`; a `HostGrad` for TorchDEQ's own.

    Args:
        producer: the entry.
        no_stat: TorchDEQ's setting of that name.
    """
    if isinstance(producer, ProduceGrad):
        return producer.strategy
    return HostGrad(producer.function if isinstance(producer, ProduceSteps) else producer, no_stat)


def report(writer: Callable[[Any], None], stats: BackwardStats) -> None:
    """Tell TorchDEQ's `backward_writer` of a backward solve, as TorchDEQ tells of its own."""
    from torchdeq.solver.stat import SolverStat

    if stats.residual is None or stats.trace is None:
        return
    steps = torch.full_like(stats.residual, stats.n_vjp)
    writer(SolverStat(rel_lowest=stats.residual, rel_trace=stats.trace, nstep=steps))


@dataclass(frozen=True, repr=False)
class HostGrad(GradStrategy):
    """TorchDEQ's own gradient, of an integer or of `ift=True`, as a strategy.

    Attributes:
        producer: the function that TorchDEQ's `backward_factory` made.
        no_stat: TorchDEQ's setting of that name.
    """

    producer: Callable[..., list[Any]]
    no_stat: bool

    def attach(self, func: Callable[[State], State], equilibrium: State, context: Context) -> State:
        """See `GradStrategy.attach`."""
        from torchdeq.utils.layer_utils import deq_decorator

        start = map_leaves(Tensor.detach, equilibrium)  # hook_ift sets requires_grad on its input
        of_leaves = func if isinstance(start, Tensor) else lambda *leaves: func(list(leaves))
        deq_func, z = deq_decorator(of_leaves, start, no_stat=self.no_stat)
        # hook_ift keeps its hook on the core, its first argument. So it gets an empty stand-in, and
        # does not touch the hook of the model.
        return deq_func.vec2list(self.producer(types.SimpleNamespace(hook=None), deq_func, z)[-1])

    def __repr__(self) -> str:
        if is_own_ift(self.producer):
            return "torchdeq(ift=True)"
        known = inspect.getclosurevars(self.producer).nonlocals
        return f"torchdeq(grad={known['n_grad_step']}, tau={known['tau']})"


def is_own_ift(producer: Callable[..., list[Any]]) -> bool:
    """Whether an entry of `produce_grad` is TorchDEQ's own implicit gradient."""
    if not inspect.isfunction(producer):
        return False
    return "n_grad_step" not in inspect.getclosurevars(producer).nonlocals
