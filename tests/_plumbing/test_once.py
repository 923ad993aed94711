"""Warnings name the line of the user that they are about."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch

import deq_phantom_plugin as dpp


def line() -> int:
    return inspect.currentframe().f_back.f_lineno


@pytest.fixture
def caught():
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        yield given


def test_a_solve_names_the_line_that_asks_for_it(caught):
    equilibrium = dpp.Equilibrium("fixed_point", "upg", max_iter=2)
    equilibrium(lambda h: torch.tanh(h + 1), torch.zeros(2, 4))
    assert [(w.filename, w.lineno) for w in caught] == [(__file__, line() - 1)]


def test_an_adjoint_solve_names_the_line_of_backward(caught):
    w = torch.eye(4).requires_grad_()
    h = dpp.Equilibrium("fixed_point", "ift(max_iter=1, tol=1e-6)")(
        lambda h: torch.tanh(0.5 * h @ w + torch.arange(4)), torch.zeros(2, 4)
    )
    h.sum().backward()
    assert [(w.filename, w.lineno) for w in caught] == [(__file__, line() - 1)]
