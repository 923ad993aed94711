"""Processes that evaluate F equally often, whatever each of them needs.

Where F communicates, as with weights that are gathered for each evaluation, every process has to
evaluate it as often as the others do, and take as many products; or they wait for one another until
a timeout. Solvers that stop at a tolerance do not.

So before an operation the processes tell one another which kind they want next, and all do the
first kind that any of them wants, as many times as earlier solves let expect (`streaks`). Who does
not want it *stands in*: does it once more and drops the result. What a solve computes is what it
would have computed alone, to the bit; one that is done goes along until all are. No solver and no
strategy need know of it.
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
from .sharding import Unfinished, may_be_sharded
from .streaks import OPERATIONS, Streak, Turn
from .transforms import in_torch_func
from .trees import State, flatten, unflatten
from .trial import Trial

R = TypeVar("R")

NOTICE = 10
"""Seconds in which a process that has raised waits for the others to hear of it."""


_DEEPEST = 1000


class Lockstep(AbstractContextManager["Lockstep"]):
    """A part of a model's forward or backward pass in which processes do operations in lockstep.

    To be entered in all of them, again and again and inside of itself; each end waits for all to
    get there. An exception in one of them ends it in all: the others raise a `RuntimeError` at
    their next operation, or at the end.

    In its first evaluation, which all processes make, the modules that run tell whether F
    communicates, and among whom. Where it does not, nothing else is done.

    Args:
        told: the process group among which F communicates; None if it does not, "auto" to find out.
        holders: the global ranks of processes that hold a state, each a group among which F
            communicates besides.
    """

    def __init__(self, told: Any = "auto", holders: Sequence[tuple[int, ...]] = ()) -> None:
        named = told is not None and not isinstance(told, str)
        self._hosts: Hosts | None = hosts_of(ranks_of(told)) if named else None
        self._known, self._holders = told is None, holders
        self._sharded: list[nn.Module] = []
        self._depth = 0  # how often it was entered
        self._over = False  # an exception has ended it
        self._last: tuple[Callable[[State], State], State] | None = None  # evaluation
        self._product: Callable[[], object] | None = None  # of zeros
        self._streak = Streak(0, int(Turn.MEET))
        self.busy = False  # with an operation: what F holds inside is in lockstep by itself

    def __enter__(self) -> Lockstep:
        _entered.stack.append(self)
        self._depth += 1
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            # Checkpoints end a forward pass that they repeat by an exception, all at one place.
            if error is None or type(error).__name__ == "_StopRecomputationError":
                self.any_of(False)
            elif self._depth == 1:  # further inside somebody may have an answer to it
                self._fail(error)
        finally:
            _entered.stack.pop()
            self._depth -= 1
            if not self._depth:
                self._last = self._product = None

    @property
    def is_on(self) -> bool:
        """Whether operations are to go through it: F communicates, or nobody knows yet.

        Products of an F that FSDP2 shards do, also where it is sharded over one process.
        """
        alone = self._known and self._hosts is None and not self._sharded
        return self._depth > 0 and not alone

    @property
    def communicates(self) -> bool:
        """Whether F is known to communicate."""
        return self._hosts is not None

    def evaluate(self, func: Callable[[State], State], state: State) -> State:
        """Return F(h), once it is the turn for that."""
        self._last = func, state
        if self._hosts is not None:
            self._wait_for(Turn.LINEARIZE if torch.is_grad_enabled() else Turn.EVALUATE)
        return self._done(lambda: func(state)) if self._known else self._first(func, state)

    def look(self, func: Callable[[State], State], state: State) -> None:
        """Find out whether F communicates in a process that has no need to evaluate it.

        Args:
            func: F.
            state: any state, perhaps of no samples, which F may not be able to take.
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
        """Return a product on a graph of F, once it is the turn for that.

        Args:
            product: computes it.
            of_zeros: computes one like it, for which others may ask from now on.
        """
        self._product = of_zeros
        self._wait_for(Turn.MULTIPLY)
        return self._multiplied(product)

    def _multiplied(self, product: Callable[[], R]) -> R:
        with Unfinished(self._sharded):
            return self._done(product)

    def stands_in_by(self, of_zeros: Callable[[], object]) -> None:
        """Be told how to compute a product that only others need."""
        self._product = of_zeros

    def any_of(self, flag: bool) -> bool:
        """Return whether a flag is set in any process; what they did differently ends here."""
        if self._hosts is None or self._over:
            return flag
        yes = Turn.MEET + 2 * (_DEEPEST - self._depth)
        return self._wait_for(yes if flag else yes + 1) == yes

    def first_of(self, number: int) -> int:
        """Return a number of the first process."""
        self.any_of(False)
        if self._hosts is None or self._over:
            return number
        return self._hosts.first_of(number)

    # --- turns ------------------------------------------------------------------------------------

    def _first(self, func: Callable[[State], State], state: State) -> State:
        """Evaluate F, and find out whether it communicates."""
        # A hook that comes and goes would have compiled code compiled again.
        communication = Communication(self._holders)
        with communication as found, eager() if may_be_compiled() else nullcontext():
            try:
                image = self._done(lambda: func(state))
            except BaseException:
                # Others may not get as far as to make a group with us; one that is there will do.
                self._hosts, self._known = self._hosts or known_hosts(found.ranks), True
                raise
        self._hosts, self._known = self._hosts or hosts_of(found.ranks), True
        self._sharded = found.sharded
        if self._hosts is None:
            self._last = None
        return image

    def _wait_for(self, wanted: int) -> int:
        """Stand in for what others do, until it is the turn for what is wanted."""
        while self._hosts is not None:
            turn = self._agreed(wanted)
            if turn == wanted or (turn >= Turn.MEET and turn // 2 == wanted // 2):
                return turn
            if turn < Turn.MEET:
                self._stand_in(Turn(turn))
        return wanted

    def _agreed(self, wanted: int) -> int:
        """Return what is done next."""
        if self._over:
            raise RuntimeError("this solve has ended by an exception in one of its processes")
        if not self._streak.agreed:
            self._agree(wanted)
        return self._streak.next(wanted)

    def _agree(self, wanted: int) -> None:
        """Agree with the others on what is done next, and how often."""
        assert self._hosts is not None
        streak, lengths = self._streak, self._hosts.lengths
        level = len(set(map(id, _entered.stack)))  # solves inside of an F have lengths of their own
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
                f"process {-1 - first} has raised an exception in this solve, in which F "
                "communicates, so that it ends in all processes; that one's says why"
            )
        if first != streak.turn:
            if streak.turn in OPERATIONS:
                lengths.ended((level, *streak.place(streak.turn)), -needed)
            self._streak = streak = Streak(streak.index + 1, first)
        streak.agreed = agreed[first] if first in OPERATIONS else 1

    def _fail(self, error: BaseException) -> None:
        """Let the others know of an exception, as far as they listen."""
        if self._hosts is None or self._over:
            return
        # They do what was agreed on, and listen then.
        start = time.monotonic()
        while self._streak.agreed and time.monotonic() < start + NOTICE:
            with suppress(Exception):
                self._stand_in(Turn(self._streak.next(Turn.MEET)))
        self._over = True
        start = time.monotonic()
        try:
            self._hosts.least([-1 - dist.get_rank(), 0, 0, 0, 0], NOTICE)
        except RuntimeError:
            at_once = time.monotonic() < start + NOTICE / 2
            if at_once and isinstance(error, RuntimeError):  # perhaps of a collective of F
                raise RuntimeError(self._gone()) from error

    def _gone(self) -> str:
        assert self._hosts is not None
        return (
            f"a process of {self._hosts.ranks} has ended, or has not come to the next "
            "evaluation of F in time: where F communicates, all of them solve in lockstep"
        )

    def _done(self, operation: Callable[[], R]) -> R:
        self.busy = True
        try:
            return operation()
        finally:
            self.busy = False

    def _stand_in(self, turn: Turn) -> None:
        """Do what others do, and drop the result."""
        if turn is Turn.MULTIPLY and self._product is not None:
            self._multiplied(self._product)
        elif turn < Turn.MULTIPLY and self._last is not None:
            self._done(lambda: self._again(turn))
        else:
            raise RuntimeError(
                f"other processes of this solve {turn.name.lower()}, and this one has nothing to "
                "do that with: all of them have to take the same strategy and solver"
            )

    def _again(self, turn: Turn) -> None:
        """Evaluate F at the last state, and leave no trace."""
        assert self._last is not None
        func, state = self._last
        with Trial(state):
            if turn is Turn.EVALUATE:
                with torch.no_grad():
                    func(state)
                return
            leaves, structure = flatten(state)
            inputs = [leaf.detach().requires_grad_() for leaf in leaves]
            # Not by the hooks around: a checkpoint would repeat its whole region for a product.
            with torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):
                outputs = flatten(func(unflatten(list(inputs), structure)))[0]
        self._product = lambda: product_of_zeros(outputs, inputs)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def product_of_zeros(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """Go backwards through a graph of F for the sake of those who do."""
    ends = [out for out in outputs if out.requires_grad]
    if ends:
        zeros = [torch.zeros_like(out) for out in ends]
        with torch.no_grad():
            torch.autograd.grad(ends, inputs, zeros, retain_graph=True, allow_unused=True)


# --- what runs in lockstep here -------------------------------------------------------------------


class _Entered(threading.local):
    """What this thread is inside of."""

    def __init__(self) -> None:
        self.stack: list[Lockstep] = []


_entered = _Entered()


def in_lockstep(
    told: Any = "auto", holders: Sequence[tuple[int, ...]] = ()
) -> AbstractContextManager[Any]:
    """Return what to enter for a solve: nothing where one process is alone, or it is compiled.

    Args:
        told: see `Lockstep`.
        holders: likewise.
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
    """Return what to enter for a part of a solve in which only some processes may evaluate F.

    At its end all of them are done with it.
    """
    return active() or nullcontext()


def active() -> Lockstep | None:
    """Return what operations of this thread are to go through, None in most cases."""
    if torch.compiler.is_compiling() or not _entered.stack:
        return None
    around = _entered.stack[-1]
    return around if around.is_on and not around.busy else None


def evaluated(func: Callable[[State], State], state: State) -> State:
    """Return F(h), in lockstep where that is."""
    together = active()
    return func(state) if together is None else together.evaluate(func, state)


def together(solver: Callable[..., R]) -> Callable[..., R]:
    """Let a solver of (func, start, ...) run in lockstep, where that is."""

    @functools.wraps(solver)
    def solve(func: Callable[[State], State], start: State, **options: Any) -> R:
        with in_lockstep() as around:
            return solver(func if around is None else in_turn(func), start, **options)

    return solve


def in_turn(func: Callable[..., State]) -> Callable[..., State]:
    """Return F, whose evaluations are in lockstep where that is."""

    def evaluate(*state: State) -> State:
        around = active()
        return func(*state) if around is None else around.evaluate(lambda s: func(*s), state)

    evaluate.__wrapped__ = func  # type: ignore[attr-defined]
    return evaluate


def any_of(flag: bool) -> bool:
    """Return whether a flag is set in any process of the solve; as it is where there is one."""
    together = active()
    return flag if together is None else together.any_of(flag)


def first_of(number: int) -> int:
    """Return a number as the first process of the solve has it."""
    together = active()
    return number if together is None else together.first_of(number)
