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


def test_a_measurement_in_silence_gives_no_warning_again():
    layer = torch.nn.Linear(4, 4).double()

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer
            self.equilibrium = dpp.Equilibrium(grad="schedule({0: 'jfb', 5: 'ift'})")

        def forward(self, x):
            return self.equilibrium(lambda h: torch.tanh(0.3 * self.layer(h) + x), 0 * x)

    model, x = Net(), torch.randn(3, 4, dtype=torch.float64)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        model(x).sum().backward()
        for _ in range(2):
            dpp.model_report(model, x, torch.sum, ["jfb", "schedule({0: 'upg', 9: 'ift'})"])
            dpp.tune(model, [x], torch.sum)
        model(x).sum().backward()
    texts = [str(w.message) for w in given]
    assert len([text for text in texts if "was not told the training step" in text]) == 1
