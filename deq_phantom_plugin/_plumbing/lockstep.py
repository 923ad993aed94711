"""Makes all processes evaluate F equally often, although each of them needs its own number.

Some maps F communicate: with FSDP2, for example, each evaluation gathers weights from all
processes. Then each process has to evaluate F as often as the others, and take as many products
with its Jacobian. Otherwise they wait for one another until a timeout. Solvers that stop at a
tolerance take a different number in each process.

So before an operation the processes tell one another which kind each wants next. All of them do
the first kind (in the order of `Turn`) that any process wants. They agree on several at once, as
many as earlier solves took (`streaks.py`). A process that does not want the operation *stands in*:
it does the operation once more and drops the result. So each process computes what it would
compute alone, to the bit. Solvers and strategies need not know of this.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from .communication import Communication
from .compilation import eager, may_be_compiled
from .exchange import Hosts, hosts_of, known_hosts, ranks_of
from .operations import Operations
from .sharding import Unfinished, may_be_sharded
from .streaks import OPERATIONS, Lengths, Streak, Turn
from .transforms import in_torch_func
from .trees import State, flatten, unflatten
from .trial import Trial

R = TypeVar("R")

NOTICE = 10
"""Seconds that a process which has raised an exception waits for the others to hear of it."""

_DEEPEST = 1000  # entries of one `Lockstep` inside of itself; meetings are numbered up to it


class Lockstep(AbstractContextManager["Lockstep"]):
    """A part of a model's forward or backward pass in which processes do operations in lockstep.

    All processes enter it. It may be entered several times, also inside of itself. Each exit waits
    until all processes have reached it. An exception in one process ends the solve in all: the
    others raise a `RuntimeError` at their next operation, or at the exit.

    All processes make the first evaluation. During it the modules that run show whether F
    communicates, and among which processes. If F does not, nothing else is done.

    Args:
        told: the process group among which F communicates; None if F does not communicate; "auto"
            to find out.
        holders: groups of processes that hold a sharded state, by their global ranks. F is taken
            to communicate among each of them, too.
    """

    def __init__(self, told: Any = "auto", holders: Sequence[tuple[int, ...]] = ()) -> None:
        named = told is not None and not isinstance(told, str)
        self._hosts: Hosts | None = hosts_of(ranks_of(told)) if named else None
        self._known, self._holders = told is None, holders
        self._sharded: list[nn.Module] = []
        self._depth = 0  # entries without an exit yet
        self._over = False  # whether an exception has ended the solve
        # What this process stands in with: F and the last state, and a product of zeros.
        self._last: tuple[Callable[[State], State], State] | None = None
        self._product: Callable[[], object] | None = None
        self._streak, self._lengths = Streak(0, int(Turn.MEET)), Lengths()
        self._operations = Operations()
        # True during an operation. A solve inside of F then takes a `Lockstep` of its own.
        self.busy = False

    def __enter__(self) -> Lockstep:
        _entered.stack.append(self)
        self._depth += 1
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            # Checkpointing ends a repeated forward pass by an exception, at one place in all.
            if error is None or type(error).__name__ == "_StopRecomputationError":
                self.any_of(False)
            elif self._depth == 1:  # deeper, a caller in this solve may still catch the exception
                self._fail(error)
        finally:
            _entered.stack.pop()
            self._depth -= 1
            if not self._depth:
                self._last = self._product = None

    @property
    def is_on(self) -> bool:
        """Whether operations go through this object: F communicates, or that is not known yet.

        Products of an F that FSDP2 shards do so even in a single process, see `Unfinished`.
        """
        alone = self._known and self._hosts is None and not self._sharded
        return self._depth > 0 and not alone

    @property
    def communicates(self) -> bool:
        """Whether F is known to communicate."""
        return self._hosts is not None

    def evaluate(self, func: Callable[[State], State], state: State) -> State:
        """Wait for the turn of an evaluation; return F(h), the same structure as the state h."""
        self._last = func, state
        if self._hosts is not None:
            self._wait_for(Turn.LINEARIZE if torch.is_grad_enabled() else Turn.EVALUATE)
        return self._done(lambda: func(state)) if self._known else self._first(func, state)

    def look(self, func: Callable[[State], State], state: State) -> None:
        """Find out whether F communicates, in a process that does not need to evaluate F itself.

        Args:
            func: F.
            state: any state. It may have no samples, and F may then raise.
        """
        if not self._known:
            self._last = func, state
            try:
                with Trial(state), torch.no_grad():
                    self._first(func, state)
            except Exception:
                if self.is_on:
                    raise

    def multiply(self, product: Callable[[], R], of_zeros: Callable[[], object]) -> R:
        """Wait for the turn of a product; return a product with the Jacobian of F.

        Args:
            product: computes the product.
            of_zeros: computes a product of zeros on the same graph. This process stands in with it
                from now on.
        """
        self._product = of_zeros
        self._wait_for(Turn.MULTIPLY)
        return self._multiplied(product)

    def _multiplied(self, product: Callable[[], R]) -> R:
        with Unfinished(self._sharded):
            return self._done(product)

    def stands_in_by(self, of_zeros: Callable[[], object]) -> None:
        """Note how to compute a product of zeros, where only other processes need products."""
        self._product = of_zeros

    def any_of(self, flag: bool) -> bool:
        """Return whether a flag is set in any process; all processes meet here, and wait."""
        if self._hosts is None or self._over:
            return flag
        # The least number of all decides: yes is below no, and inner meetings are below outer ones.
        yes = Turn.MEET + 2 * (_DEEPEST - self._depth)
        return self._wait_for(yes if flag else yes + 1) == yes

    def first_of(self, number: int) -> int:
        """Return the number that the first process gives."""
        self.any_of(False)
        if self._hosts is None or self._over:
            return number
        return self._hosts.first_of(number)

    # --- turns ------------------------------------------------------------------------------------

    def _first(self, func: Callable[[State], State], state: State) -> State:
        """Evaluate F, and find out whether F communicates."""
        # F runs uncompiled here: a hook that is added and removed would make it compile again.
        communication = Communication(self._holders)
        with communication as found, eager() if may_be_compiled() else nullcontext():
            try:
                image = self._done(lambda: func(state))
            except BaseException:
                # The others may not come to make a new group. So only one that exists is told.
                self._hosts, self._known = self._hosts or known_hosts(found.ranks), True
                raise
        self._hosts, self._known = self._hosts or hosts_of(found.ranks), True
        self._sharded = found.sharded
        if self._hosts is None:
            self._last = None
        else:
            self._lengths = self._hosts.lengths_of(found.first)
        return image

    def _wait_for(self, wanted: int) -> int:
        """Stand in for operations of others until this process's turn comes; return the turn."""
        while self._hosts is not None:
            turn = self._agreed(wanted)
            if turn == wanted or (turn >= Turn.MEET and turn // 2 == wanted // 2):
                return turn
            if turn < Turn.MEET:
                self._stand_in(Turn(turn))
        return wanted

    def _agreed(self, wanted: int) -> int:
        """Return which kind of operation all processes do next."""
        if self._over:
            raise RuntimeError(
                "this solve has ended by an exception in one of its processes; start a new one"
            )
        if not self._streak.agreed:
            self._agree(wanted)
        return self._streak.next(wanted)

    def _agree(self, wanted: int) -> None:
        """Agree with the other processes on what is done next, and how often."""
        assert self._hosts is not None
        streak, lengths = self._streak, self._lengths
        seconds = streak.seconds  # without the time for which the others are waited for here
        level = len(set(map(id, _entered.stack)))  # a solve inside of F has lengths of its own
        expected = [
            lengths.more((level, *streak.place(turn)), streak.done if turn == streak.turn else 0)
            for turn in OPERATIONS
        ]
        try:
            first, needed, *agreed = self._hosts.least([wanted, -streak.needed, *expected])
        except RuntimeError as error:
            self._over = True
            raise RuntimeError(self._gone()) from error
        if first < 0:
            self._over = True
            raise RuntimeError(
                f"process {-1 - first} has raised an exception in this solve. F communicates, so "
                "the solve ends in all processes. The cause is in that process's own traceback"
            )
        if first != streak.turn:
            if streak.turn in OPERATIONS:
                lengths.ended((level, *streak.place(streak.turn)), -needed, seconds)
            self._streak = streak = Streak(streak.index + 1, first)
        streak.agreed = agreed[first] if first in OPERATIONS else 1

    def _fail(self, error: BaseException) -> None:
        """Tell the other processes of an exception, if they listen in time."""
        if self._hosts is None or self._over:
            return
        # The others first do all that was agreed on. They listen after that.
        end = time.monotonic() + NOTICE
        while self._streak.agreed and not self._operations.cut and time.monotonic() < end:
            with suppress(Exception):
                self._stand_in(Turn(self._streak.next(Turn.MEET)))
        self._over = True
        start = time.monotonic()
        try:
            self._hosts.least([-1 - dist.get_rank(), 0, 0, 0, 0], NOTICE)
        except RuntimeError:
            at_once = time.monotonic() < start + NOTICE / 2
            if at_once and isinstance(error, RuntimeError):  # perhaps of a collective inside of F
                raise RuntimeError(self._gone()) from error

    def _gone(self) -> str:
        assert self._hosts is not None
        return (
            f"a process of {self._hosts.ranks} has ended, or has not come to the next evaluation "
            "of F in time. F communicates, so all of them have to take part in each solve. Look "
            "for an exception in the output of the other processes"
        )

    def _done(self, operation: Callable[[], R]) -> R:
        self.busy = True
        try:
            with self._operations:
                return operation()
        finally:
            self.busy = False

    def _stand_in(self, turn: Turn) -> None:
        """Do an operation that only other processes want, and drop the result."""
        if turn is Turn.MULTIPLY and self._product is not None:
            self._multiplied(self._product)
        elif turn < Turn.MULTIPLY and self._last is not None:
            self._done(lambda: self._again(turn))
        else:
            raise RuntimeError(
                f"other processes of this solve {turn.name.lower()} next, and this process cannot: "
                "it has no evaluation or graph of F for that yet. Give all processes the same "
                "strategy and the same solver"
            )

    def _again(self, turn: Turn) -> None:
        """Evaluate F at the last state once more, and leave no trace of that."""
        assert self._last is not None
        func, state = self._last
        with Trial(state):
            if turn is Turn.EVALUATE:
                with torch.no_grad():
                    func(state)
                return
            leaves, structure = flatten(state)
            inputs = [leaf.detach().requires_grad_() for leaf in leaves]
            # Hooks around this solve are kept off: with those of activation checkpointing, a
            # product on this graph would repeat the whole checkpointed region.
            with torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):
                outputs = flatten(func(unflatten(list(inputs), structure)))[0]
        self._product = lambda: product_of_zeros(outputs, inputs)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def product_of_zeros(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """Take a product of zeros with the Jacobian of F, so that other processes can take theirs."""
    ends = [out for out in outputs if out.requires_grad]
    if ends:
        zeros = [torch.zeros_like(out) for out in ends]
        with torch.no_grad():
            torch.autograd.grad(ends, inputs, zeros, retain_graph=True, allow_unused=True)


# --- what runs in lockstep here -------------------------------------------------------------------


class _Entered(threading.local):
    """Every `Lockstep` that this thread is inside of, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[Lockstep] = []


_entered = _Entered()


def in_lockstep(
    told: Any = "auto", holders: Sequence[tuple[int, ...]] = ()
) -> AbstractContextManager[Any]:
    """Return the `Lockstep` to enter for a solve; for the arguments see there.

    For a single process, in compiled code and inside `torch.func` it is a null context.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    if not (dist.is_available() and dist.is_initialized()) or in_torch_func():
        return nullcontext()
    if dist.get_world_size() == 1 and not may_be_sharded():
        return nullcontext()
    around = _entered.stack[-1] if _entered.stack else None
    if around is not None and not around.busy:
        named = told is not None and not isinstance(told, str)
        if around.communicates or not named:
            return nullcontext(around)
    return Lockstep(told, holders)


def part() -> AbstractContextManager[Any]:
    """Return what to enter for a part that perhaps only some processes need; its exit waits."""
    return active() or nullcontext()


def active() -> Lockstep | None:
    """Return the `Lockstep` that operations of this thread have to go through, or None."""
    if torch.compiler.is_compiling() or not _entered.stack:
        return None
    around = _entered.stack[-1]
    return around if around.is_on and not around.busy else None


def evaluated(func: Callable[[State], State], state: State) -> State:
    """Return F(h); evaluate in lockstep if that is active."""
    together = active()
    return func(state) if together is None else together.evaluate(func, state)


def together(solver: Callable[..., R]) -> Callable[..., R]:
    """Decorate a solver of (func, start, ...), so that it runs in lockstep where F communicates."""

    @functools.wraps(solver)
    def solve(func: Callable[[State], State], start: State, **options: Any) -> R:
        with in_lockstep() as around:
            return solver(func if around is None else in_turn(func), start, **options)

    return solve


def in_turn(func: Callable[..., State]) -> Callable[..., State]:
    """Return F with its evaluations in lockstep, whenever that is active."""

    def evaluate(*state: State) -> State:
        around = active()
        return func(*state) if around is None else around.evaluate(lambda s: func(*s), state)

    evaluate.__wrapped__ = func  # type: ignore[attr-defined]
    return evaluate


def any_of(flag: bool) -> bool:
    """Return whether a flag is set in any process of the solve; outside of lockstep, the flag."""
    together = active()
    return flag if together is None else together.any_of(flag)


def first_of(number: int) -> int:
    """Return the number that the first process gives; outside of lockstep, `number` itself."""
    together = active()
    return number if together is None else together.first_of(number)
