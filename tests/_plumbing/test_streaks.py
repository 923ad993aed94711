"""How often processes in lockstep agree, and how much they do for nothing."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from deq_phantom_plugin._plumbing import exchange
from deq_phantom_plugin._plumbing.lockstep import NOTICE
from deq_phantom_plugin._plumbing.streaks import LONGEST, REMEMBERED, Lengths, Streak

counts = st.integers(1, 60)


def solve(lengths, *needed):
    """Operations done, and exchanges, of processes that need some; without a model."""
    streaks, left, exchanges = [Streak(1, 0) for _ in needed], list(needed), 0
    while True:
        exchanges += 1
        longest = max(streak.needed for streak in streaks)
        if not any(left):
            lengths.ended("place", longest, 0.0)
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
        lengths.ended("a", 20, 0.0)
    assert (lengths.more("a", 0), lengths.more("a", 15), lengths.more("a", 20)) == (20, 5, 1)
    assert lengths.more("b", 0) == 1
    lengths.ended("a", 10, 0.0)
    assert lengths.more("a", 0) == 7


def test_slow_operations_are_agreed_on_for_some_seconds_at_most():
    """Or a process that fails would have to go along for longer than it does."""
    lengths = Lengths()
    for _ in range(REMEMBERED):
        lengths.ended("a", 20, LONGEST / 4)
        lengths.ended("b", 20, 10 * LONGEST)
    assert (lengths.more("a", 0), lengths.more("a", 18), lengths.more("b", 0)) == (4, 2, 1)
    assert LONGEST < NOTICE


def test_each_map_has_lengths_of_its_own(monkeypatch):
    """A small F that needs many evaluations says nothing of a large one that needs few."""
    monkeypatch.setattr(exchange.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(exchange.dist, "new_group", lambda **options: None)
    monkeypatch.setattr(exchange, "_timeout", lambda: None)
    hosts, layers = exchange.Hosts((0, 1)), [torch.nn.Linear(1, 1) for _ in range(2)]
    assert len({id(hosts.lengths_of(module)) for module in (*layers, None)}) == 3
    assert hosts.lengths_of(layers[0]) is hosts.lengths_of(layers[0])
