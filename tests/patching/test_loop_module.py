"""`patching.Loop` whose number of evaluations comes with each call, against the loop by hand."""

from __future__ import annotations

import copy

import pytest
import torch

import deq_phantom_plugin as dpp
from deq_phantom_plugin.patching import Loop

torch.manual_seed(0)
WEIGHT = (0.3 * torch.randn(4, 4, dtype=torch.float64)).requires_grad_()
Z = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
START = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
INPUTS = (WEIGHT, Z, START)


def func(h):
    return torch.tanh(h @ WEIGHT + Z)


def by_hand(steps, graph):
    h = START
    with torch.no_grad():
        for _ in range(steps - graph):
            h = func(h)
    for _ in range(graph):
        h = func(h)
    return h


def gradients(h):
    return torch.autograd.grad(h.square().sum(), INPUTS, materialize_grads=True, allow_unused=True)


def same(got, want):
    return torch.equal(got, want) and all(map(torch.equal, gradients(got), gradients(want)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("steps", "graph"), [(5, 2), (5, 5), (1, 1), (4, 1)])
def test_no_name_is_the_graph_that_the_call_asks_for(steps, graph, training):
    loop = Loop(None).train(training)
    assert loop.is_own
    assert same(loop(func, START, steps=steps, graph=graph), by_hand(steps, graph))
    assert loop.last.nfe == steps


def test_no_graph_and_no_evaluations():
    loop = Loop(None)
    found = loop(func, START, steps=3, graph=0)
    assert torch.equal(found, by_hand(3, 3))
    assert not found.requires_grad
    assert loop(func, START, steps=0, graph=2) is START


@pytest.mark.parametrize("spec", ["bptt", "schedule({0: 'bptt', 9: 'jfb'})", "tbptt('all')"])
def test_all_of_the_loop_is_all_of_each_call(spec):
    loop = Loop(spec)
    dpp.set_step(loop, 0)
    for one in (loop, copy.deepcopy(loop)):
        for steps in (2, 5):
            assert same(one(func, START, steps=steps, graph=1), by_hand(steps, steps))


def test_a_number_that_is_named_stays():
    found = Loop("bptt(steps=3)")(func, START, steps=5, graph=1)
    assert same(found, by_hand(3, 3))
    loop = Loop("bptt")
    loop.grad = "bptt(steps=3)"
    assert same(loop(func, START, steps=5, graph=1), by_hand(3, 3))
    loop.grad = None
    assert same(loop(func, START, steps=5, graph=1), by_hand(5, 1))


def test_a_name_counts_in_training_alone():
    loop = Loop("tbptt(k=3)")
    assert same(loop(func, START, steps=5, graph=0), by_hand(5, 3))
    loop.eval()
    with torch.no_grad():
        found = loop(func, START, steps=5, graph=1)
    assert torch.equal(found, by_hand(5, 1))


def test_a_call_without_a_number_is_refused():
    with pytest.raises(ValueError, match="steps=None; expected the number"):
        Loop("npg")(func, START)
