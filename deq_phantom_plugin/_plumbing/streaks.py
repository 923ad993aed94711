"""How often processes in lockstep do the same in a row, so that they agree on several at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from enum import IntEnum

REMEMBERED = 4
"""Of how many streaks at a place the length is remembered."""

SHARE = 0.75
"""How much of what is left of a streak is agreed on at once, where its length differs by solve."""


class Turn(IntEnum):
    """What a process wants to do next; of different ones the first in this order is done.

    Numbers from `MEET` on are for who waits: with an answer, yes or no, at a depth. Who is deeper
    inside comes first, so that a process that has left a part out meets the others at its end.
    """

    EVALUATE = 0
    LINEARIZE = 1  # an evaluation with a graph
    MULTIPLY = 2  # a product on such a graph
    MEET = 4


OPERATIONS = (Turn.EVALUATE, Turn.LINEARIZE, Turn.MULTIPLY)


class Lengths:
    """Lengths of earlier streaks by place, of which the shortest says what to expect.

    A solve takes about as many evaluations as the last one at its place did. So processes that have
    agreed on an evaluation agree on most of those to come as well. A solve that is shorter this
    time does the rest of them for nothing; what it computes is the same.
    """

    def __init__(self) -> None:
        self._seen: dict[Hashable, deque[int]] = {}

    def ended(self, place: Hashable, length: int) -> None:
        """Remember that a streak had a length."""
        self._seen.setdefault(place, deque(maxlen=REMEMBERED)).append(length)

    def more(self, place: Hashable, done: int) -> int:
        """Return how many operations to agree on at once, one or more, after those done."""
        seen = self._seen.get(place, (0,))
        left = min(seen) - done
        always = len(seen) == REMEMBERED and min(seen) == max(seen)
        return max(1, left if always else int(SHARE * left))


class Streak:
    """Operations of one kind in a row.

    Attributes:
        index: the how-manieth streak of a solve it is.
        turn: the kind.
        agreed: how many more are agreed on.
        done: how many have been done.
        needed: how many of them until the last that this process wanted.
    """

    def __init__(self, index: int, turn: int) -> None:
        self.index, self.turn = index, turn
        self.agreed = self.done = self.needed = 0

    def place(self, turn: int) -> tuple[int, int]:
        """Return where operations of a kind are that come next."""
        return self.index + (turn != self.turn), turn

    def next(self, wanted: int) -> int:
        """Count one operation, wanted or not, and return its kind."""
        self.agreed -= 1
        self.done += 1
        if wanted == self.turn:
            self.needed = self.done
        return self.turn
