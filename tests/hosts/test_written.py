"""A spec as the text that a config saves: it means the same in a loop of any length."""

from __future__ import annotations

import pytest

import deq_phantom_plugin as dpp
from deq_phantom_plugin.hosts.written import written


class Unregistered(dpp.GradStrategy):
    def attach(self, func, equilibrium, context):
        return func(equilibrium)


OPEN = [
    "bptt",
    {"name": "bptt"},
    dpp.BPTT,
    "schedule({0: 'bptt', 9: 'jfb'})",
    {"name": "schedule", "stages": {0: {"name": "bptt"}, 9: dpp.JFB}},
    {"name": "guard", "grad": {"name": "bptt"}},
]
CLOSED = [
    "npg",
    {"name": "upg", "k": 4},
    dpp.BPTT(steps=3),
    {"name": "bptt", "steps": 2},
    dpp.JFB,
    dpp.IFT(tol=1e-2),
]


@pytest.mark.parametrize("spec", OPEN, ids=str)
def test_what_is_left_open_stays_open(spec):
    text = written(spec, 1)
    for steps in (1, 2, 7):
        known = {"steps": steps}
        assert dpp.get_strategy(text, known) == dpp.get_strategy(spec, known)
    assert dpp.get_strategy(text, {"steps": 1}) != dpp.get_strategy(text, {"steps": 7})


@pytest.mark.parametrize("spec", CLOSED, ids=str)
def test_what_is_named_is_written_out(spec):
    text = written(spec, 3)
    assert text == repr(dpp.get_strategy(spec))
    assert dpp.get_strategy(text, {"steps": 7}) == dpp.get_strategy(spec)


def jfb(func, equilibrium, context):  # a function with the name of another strategy
    return func(equilibrium)


@pytest.mark.parametrize(
    "spec",
    [jfb, Unregistered, Unregistered(), {"name": "schedule", "stages": {0: jfb, 5: "ift"}}],
    ids=["function", "class", "object", "inside"],
)
def test_what_has_no_text_is_not_written(spec):
    assert written(spec, 3) is None
