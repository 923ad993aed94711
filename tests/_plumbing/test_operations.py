"""An operation that an exception has cut before its last collective."""

from __future__ import annotations

import contextlib

import pytest

from deq_phantom_plugin._plumbing import operations
from deq_phantom_plugin._plumbing.operations import Operations


@pytest.mark.parametrize(
    ("usual", "taken", "cut"), [(2, 2, False), (2, 1, True), (2, 0, True), (None, 0, True)]
)
def test_cut(monkeypatch, usual, taken, cut):
    begun = [7]
    monkeypatch.setattr(operations, "_n_collectives", lambda: begun[0])
    counted = Operations()
    if usual is not None:
        with counted:
            begun[0] += usual
    assert not counted.cut
    with contextlib.suppress(ArithmeticError), counted:
        begun[0] += taken
        raise ArithmeticError
    assert counted.cut == cut
    with counted:
        begun[0] += 2
    assert not counted.cut


def test_where_nobody_counts_an_operation_that_failed_counts_as_cut(monkeypatch):
    monkeypatch.setattr(operations, "_n_collectives", lambda: None)
    counted = Operations()
    with counted:
        pass
    with contextlib.suppress(ArithmeticError), counted:
        raise ArithmeticError
    assert counted.cut
