"""How often processes in lockstep agree, and how much they do for nothing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deq_phantom_plugin._plumbing.streaks import REMEMBERED, Lengths, Streak

counts = st.integers(1, 60)


def solve(lengths, *needed):
    """Operations done, and exchanges, of processes that need some; without a model."""
    streaks, left, exchanges = [Streak(1, 0) for _ in needed], list(needed), 0
    while True:
        exchanges += 1
        longest = max(streak.needed for streak in streaks)
        if not any(left):
            lengths.ended("place", longest)
            return streaks[0].done, exchanges, longest
        agreed = lengths.more("place", streaks[0].done)
        for rank, streak in enumerate(streaks):
            streak.agreed = agreed
            while streak.agreed:
                wants = left[rank] > 0
                assert streak.next(0 if wants else 9) == 0
                left[rank] -= wants


@given(st.lists(st.tuples(counts, counts), min_size=1, max_size=12))
def test_each_gets_what_it_needs_and_the_most_that_is_needed_is_known(solves):
    lengths = Lengths()
    for needed in solves:
        done, exchanges, longest = solve(lengths, *needed)
        assert longest == max(needed) <= done
        assert exchanges <= done + 1


@given(st.lists(counts, min_size=1, max_size=12), counts)
def test_what_is_done_for_nothing_is_less_than_the_shortest_of_the_last(before, needed):
    lengths = Lengths()
    for length in before:
        solve(lengths, length, 1)
    done, _, _ = solve(lengths, needed, 1)
    assert done <= max(needed, min(before[-REMEMBERED:]))


@given(counts)
def test_what_is_always_the_same_is_agreed_on_once(needed):
    lengths = Lengths()
    for _ in range(REMEMBERED):
        assert solve(lengths, needed, needed)[0] == needed
    assert solve(lengths, needed, needed) == (needed, 2, needed)  # and once that it has ended


def test_places_have_lengths_of_their_own():
    lengths = Lengths()
    for _ in range(REMEMBERED):
        lengths.ended("a", 20)
    assert (lengths.more("a", 0), lengths.more("a", 15), lengths.more("a", 20)) == (20, 5, 1)
    assert lengths.more("b", 0) == 1
    lengths.ended("a", 10)
    assert lengths.more("a", 0) == 7
