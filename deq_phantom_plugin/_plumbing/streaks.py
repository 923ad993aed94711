"""How many operations of one kind processes in lockstep may agree on at once.

Processes in lockstep (`lockstep.py`) exchange a few numbers before they do an operation. A *streak*
is a row of operations of one kind, such as the evaluations of one forward solve. This file counts
the operations of a streak and remembers how long earlier streaks were. So the processes agree on
most of a streak at once, and exchange numbers less often.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Hashable
from enum import IntEnum

REMEMBERED = 4
"""How many streak lengths are remembered for each place."""

SHARE = 0.75
"""The share of a streak's expected rest that is agreed on at once, if the lengths have differed."""

LONGEST = 5.0
"""Seconds that the operations take which are agreed on at once, at most.

Meanwhile nobody hears of an exception in another process, and an operation may be for nothing.
"""


class Turn(IntEnum):
    """What a process wants to do next. If wishes differ, the smallest number is done first.

    Numbers from `MEET` on are meetings: a process waits there for all others. Each number stands
    for a depth and an answer, yes or no. Deeper meetings have smaller numbers. So a process that
    has left a part out waits until the others have met at the end of that part.
    """

    EVALUATE = 0  # F(h) without a graph
    LINEARIZE = 1  # F(h) with a graph
    MULTIPLY = 2  # a product on such a graph
    MEET = 4  # even, so that halving a number gives the same for both answers


OPERATIONS = (Turn.EVALUATE, Turn.LINEARIZE, Turn.MULTIPLY)


class Lengths:
    """Lengths of earlier streaks, by their place in a solve.

    A solve takes about as many evaluations as the last solves took at this place. So the shortest
    of them tells how many evaluations to expect. Where a solve needs fewer this time, the processes
    do the rest for nothing, and the result of the solve is the same.
    """

    def __init__(self) -> None:
        self._seen: dict[Hashable, deque[int]] = {}
        self._seconds: dict[Hashable, float] = {}

    def ended(self, place: Hashable, length: int, seconds: float) -> None:
        """Remember a streak that has ended.

        Args:
            place: the streak's place.
            length: how many operations some process wanted.
            seconds: how long an operation took, with what the solver did between them.
        """
        self._seen.setdefault(place, deque(maxlen=REMEMBERED)).append(length)
        self._seconds[place] = seconds

    def more(self, place: Hashable, done: int) -> int:
        """Return how many operations to agree on next, at least 1.

        Args:
            place: the streak's place.
            done: how many operations of the streak have been done already.
        """
        seen = self._seen.get(place, (0,))
        left = min(seen) - done
        always = len(seen) == REMEMBERED and min(seen) == max(seen)
        in_time = int(LONGEST / max(self._seconds.get(place, 0.0), 1e-6))
        return max(1, min(left if always else int(SHARE * left), in_time))


class Streak:
    """A row of operations of one kind, as one process counts them.

    Attributes:
        index: the number of the streak in its solve, from 0.
        turn: the kind of operation.
        agreed: how many more operations the processes have agreed on.
        done: how many operations have been done.
        needed: how many had been done with the last one that this process itself wanted.
    """

    def __init__(self, index: int, turn: int) -> None:
        self.index, self.turn = index, turn
        self.agreed = self.done = self.needed = 0
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long an operation has taken, with what the solver did between them."""
        return (time.monotonic() - self._began) / max(self.done, 1)

    def place(self, turn: int) -> tuple[int, int]:
        """Return the place of operations of a kind, if they come next."""
        return self.index + (turn != self.turn), turn

    def next(self, wanted: int) -> int:
        """Count one operation, which this process may want or not; return its kind."""
        self.agreed -= 1
        self.done += 1
        if wanted == self.turn:
            self.needed = self.done
        return self.turn
