"""Hooks on the forward pass of TorchDEQ's cores: which gradient each state of a solve gets.

`hook_forward` wraps the whole pass, and `hook_solve` each solve in it. They note where solves begin
and how they end, for the entries of `produce_grad` (`entries.py`). They also skip solves that a
strategy owns, attach in evaluation mode if asked to, and keep processes in lockstep.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._plumbing.lockstep import Lockstep, in_lockstep, in_turn
from ..._plumbing.once import warn_once
from ...attach import attach
from ...contract.errors import AssumptionWarning
from ...contract.state import State
from ...contract.strategy import Context
from ..evaluation import attaches, watched
from . import solvers
from .core import (
    Call,
    Observed,
    batch_dim,
    calls,
    func_and_start,
    n_equilibria,
    process_group,
    solves_at_once,
    with_func,
)
from .entries import Entry, ProduceGrad, differ, is_own_ift, report, strategy_of
from .form import Form, evaluate, like_start, map_leaves


def hook_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Note the initial state of a forward pass; attach in evaluation mode if that is asked for."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with in_lockstep(process_group(self)) as around:
            if around is None:
                return solved(self, *args, **kwargs)
            args, kwargs = with_func(args, kwargs, _in_turn)
            found = solved(self, *args, **kwargs)
            if around.communicates and any(map(is_own_ift, self.produce_grad)):
                _say_own_ift()
            if solves_at_once(self) and n_equilibria(self) > 1:
                _check_equally_many(around, len(found[0]))
            return found

    def solved(self: Any, *args: Any, **kwargs: Any) -> Any:
        in_eval = not self.training and attaches(self)
        if not (self.training or in_eval):
            args, kwargs = with_func(args, kwargs, functools.partial(watched, self))
        args, kwargs = _with_solve_dtype(self, args, kwargs)
        named = self.training and any(isinstance(p, Entry) for p in self.produce_grad)
        if not (named or in_eval) and not solvers.sees_states(self.f_solver):
            return original(self, *args, **kwargs)
        # `calls` is local to the thread: several threads may run one model at the same time.
        by_deq, key = calls.by_deq, id(self)
        func, start = func_and_start(args, kwargs)
        before, by_deq[key] = by_deq.get(key), (call := Call(start, in_eval))
        try:
            states, info = original(self, *args, **kwargs)
            if in_eval:
                writer = kwargs.get("backward_writer")
                states = [*states[:-1], _attached_in_eval(self, call, func, states[-1], writer)]
            return states, info
        finally:
            del by_deq[key]
            if before is not None:
                by_deq[key] = before

    return forward


def _check_equally_many(around: Lockstep, n_states: int) -> None:
    """Refuse it if processes have different numbers of states.

    Each state has a backward pass of its own, so the processes would wait for one another.

    Raises:
        RuntimeError: in all processes.
    """
    if around.any_of(around.first_of(n_states) != n_states):
        raise RuntimeError(
            f"F communicates, and the solve of a DEQIndexing handed out {n_states} states here and "
            "another number in another process, since a solve that stops early leaves states out. "
            "Each state has a backward pass, so the processes would wait for one another. Let all "
            "processes go through all steps (f_tol=0), or take core='sliced'"
        )


def _in_turn(func: Any) -> Any:
    """Return F with its evaluations in lockstep; an `Observed` stays one."""
    if isinstance(func, Observed):
        func.func = in_turn(func.func)
        return func
    return in_turn(func)


def _say_own_ift() -> None:
    """Warn once that TorchDEQ's own implicit gradient is not in lockstep."""
    warn_once(
        "TorchDEQ's own ift in several processes",
        "F communicates with other processes, and TorchDEQ's own implicit gradient (ift=True, "
        "hook_ift=True) takes in each process only as many products as this process needs. If the "
        "numbers differ, the processes wait for one another until a timeout. Take grad='ift', "
        "which solves in lockstep. This is said once.",
        AssumptionWarning,
    )


def _with_solve_dtype(
    deq: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a core's `forward`, with the core's `solve_dtype` as an option."""
    given = args[2] if len(args) > 2 else kwargs.get("solver_kwargs")
    options = {"solve_dtype": getattr(deq, "solve_dtype", None), **(given or {})}
    if solvers.checked_dtype(options["solve_dtype"], deq.f_solver) is None:
        return args, kwargs
    if len(args) > 2:
        return (*args[:2], options, *args[3:]), kwargs
    return args, {**kwargs, "solver_kwargs": options}


def _attached_in_eval(
    deq: Any, call: Call, func: Callable[..., Any], found: State, writer: Any
) -> State:
    """Return the last state of a solve in evaluation mode, with its gradient attached.

    Args:
        deq: the core.
        call: what the forward pass knows.
        func: the user's function.
        found: the last state.
        writer: TorchDEQ's `backward_writer`, or None.
    """
    producer = deq.produce_grad[-1]
    context = Context(
        batch_dim=batch_dim(deq),
        initial_state=call.z_init if isinstance(call.z_init, Tensor) else list(call.z_init),
        solver_result=call.infos[-1],
        monitor=None if writer is None else functools.partial(report, writer),
        memory=deq.grad_memory[-1] if isinstance(producer, ProduceGrad) else None,
        process_group=process_group(deq),
    )
    strategy = strategy_of(producer, deq.no_stat)
    state = like_start(map_leaves(Tensor.detach, found), call.z_init)
    return attach(functools.partial(evaluate, func), state, strategy, context)


def hook_solve(original: Callable[..., Any]) -> Callable[..., Any]:
    """Solve, unless a strategy owns the solve; note the result, and the entry of each state."""

    def _solve_fixed_point(self: Any, deq_func: Any, z_init: Any, *args: Any, **kwargs: Any) -> Any:
        call = calls.by_deq.get(id(self))
        if call is None:
            return original(self, deq_func, z_init, *args, **kwargs)
        Form.remember(deq_func, call.z_init)
        if not (self.training or call.in_eval):
            return original(self, deq_func, z_init, *args, **kwargs)
        from torchdeq.solver.stat import SolverStat

        at_once = solves_at_once(self)
        producers = self.produce_grad if at_once else [self.produce_grad[call.solves]]
        if call.in_eval:
            producers = self.produce_grad[-1:]
        call.solves += 1
        strategies = [p.current(self) if isinstance(p, ProduceGrad) else None for p in producers]
        if torch.is_grad_enabled() and all(s is not None and s.owns_solve for s in strategies):
            known = info = SolverStat()  # every entry is -1, TorchDEQ's "not known"
            solved = (z_init, [z_init] * len(producers), info) if at_once else (z_init, info)
        else:
            wanted = any(s is not None and s.wants_inverse_jacobian for s in strategies)
            if wanted and solvers.keeps_inverse_jacobian(self.f_solver):
                options = kwargs.get("solver_kwargs") or {}
                kwargs["solver_kwargs"] = {**options, "keep_inverse": True}
            if at_once and "indexing" in kwargs:
                kwargs["indexing"] = Asked(kwargs["indexing"])
            solved = original(self, deq_func, z_init, *args, **kwargs)
            known = solvers.take_inverse_jacobian(solved[-1])
            if at_once:
                indexing = kwargs.get("indexing", self.indexing)
                call.entries = _entries(indexing, len(solved[1]), producers)
                call.left_out = _is_left_out(indexing, solved[0], solved[1])
                if call.left_out:
                    _say_left_out(indexing.found[-1], len(solved[1]), len(producers))
        if isinstance(deq_func.func, Observed):
            deq_func.func.solver_result = known
        call.initial_states += [z_init] * len(producers)
        call.infos += [known] * len(producers)
        return solved

    return _solve_fixed_point


class Asked(list[int]):
    """The steps of DEQIndexing; remembers at which of them a solver handed out a state.

    A solver asks `step in indexing`, and keeps the state if so, but it does not keep the step.

    Attributes:
        found: those steps, in the order in which the solver reached them.
    """

    def __init__(self, steps: Iterable[int]) -> None:
        super().__init__(steps)
        self.found: list[int] = []

    def __contains__(self, step: object) -> bool:
        """Whether a state is sampled at a step; if so, remember the step."""
        sampled = super().__contains__(step)
        if sampled:
            self.found.append(step)  # type: ignore[arg-type]
        return sampled


def _entries(indexing: Sequence[int], n_states: int, producers: Sequence[Any]) -> list[int]:
    """Return, for each state that a solve of DEQIndexing hands out, the index of its entry.

    TorchDEQ pairs the first state with the first entry, and so on. This is wrong if a solver stops
    early, if it leaves out its first steps, and if a step is twice in the list.

    Args:
        indexing: the step of each entry; for the last entry, the limit of the solve.
        n_states: how many states the solve handed out.
        producers: TorchDEQ's `produce_grad`.
    """
    last = len(producers) - 1
    steps = indexing.found if isinstance(indexing, Asked) else []
    if len(steps) != n_states:  # a user's solver may not ask `step in indexing`
        steps = sorted(set(indexing))
    before = list(indexing[:-1])
    if before != sorted(before) and differ(producers):
        warn_once(
            f"unsorted {before}",
            f"indexing={before} is not in ascending order. Each entry of grad belongs to the step "
            "at its place, but the states are handed out in the order of the steps. Sort indexing, "
            "and the entries of grad with it",
            AssumptionWarning,
        )
    # A solve may hand out more states than there are entries, if it has more steps than planned.
    n_handed_out = min(n_states, len(producers))
    entries = [min(indexing.index(step), last) for step in steps[: n_handed_out - 1]]
    return [*entries, last]


def _is_left_out(indexing: Sequence[int], found: Tensor, states: Sequence[Tensor]) -> bool:
    """Whether a solve stopped early, so that the last state handed out is not what it found."""
    steps = indexing.found if isinstance(indexing, Asked) else []
    # A solver that is not TorchDEQ's may not ask `step in indexing`; `indexing[-1]` is the limit.
    if not steps or len(steps) != len(states) or steps[-1] >= indexing[-1]:
        return False
    return states[-1] is not found and not torch.equal(states[-1], found)


def _say_left_out(step: int, n_states: int, wanted: int) -> None:
    """Warn once that a DEQIndexing has found its equilibrium, and does not hand it out.

    Args:
        step: the step of the last state that it hands out.
        n_states: how many states it hands out.
        wanted: how many it was asked for.
    """
    warn_once(
        "equilibrium left out",
        f"the solver of a DEQIndexing stopped early, and TorchDEQ then leaves out the equilibrium: "
        f"it hands out {n_states} of {wanted} states, and the last one is that of step {step}. So "
        "the loss of states[-1] trains an early state, while evaluation has the equilibrium. Take "
        "core='sliced', which hands out all states. This is said once.",
        AssumptionWarning,
    )
