"""A gradient that is set while its host is not enabled: it is said, and acts once it is enabled.

The references are the framework's own gradient, and a model to which the name is given later.
"""

from __future__ import annotations

import warnings

import pytest
import torch

import deq_phantom_plugin as dpp
from host_cases import CASES, HrmTextCase, TorchDEQCase

NAME = "upg(k=2, lam=0.4)"


def cases(*, but=()):
    there = [case for case in CASES if not case.missing and case.name not in but]
    return pytest.mark.parametrize("case", there, ids=lambda case: case.name)


def own_and_named(case):
    """The gradients of a model with its own gradient, and after it is given a name."""
    model = case.model(case.own)
    own = case.gradients(model)
    dpp.enable(case.name)
    dpp.set_grad(model, NAME)
    named = case.gradients(model)
    dpp.disable(case.name)
    return own, named


def equal(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


@cases(but=["torchdeq"])
def test_a_host_that_is_not_enabled_is_named_with_what_to_call(case):
    own, named = own_and_named(case)
    assert not equal(own, named)
    model = case.model(case.own)
    says = rf"host {case.name} is not enabled, so 'upg.*dpp\.enable\(\"{case.name}\"\)"
    with pytest.warns(dpp.AssumptionWarning, match=says) as said:
        assert dpp.set_grad(model, NAME) == 1
        dpp.set_grad(model, NAME)
        dpp.set_grad(case.model(case.own), NAME)
    assert len([w for w in said if "is not enabled" in str(w.message)]) == 1
    if case.name != "silva":  # which takes a mode that it does not know for implicit
        assert equal(case.gradients(model), own)
    dpp.enable(case.name)
    assert equal(case.gradients(model), named)


@cases()
def test_nothing_is_said_where_the_host_is_enabled(case):
    dpp.enable(case.name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dpp.set_grad(case.model(case.own), NAME)


@pytest.mark.skipif(bool(HrmTextCase.missing), reason="no hrm_text")
def test_its_own_gradient_acts_without_the_host():
    model = HrmTextCase().model(None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dpp.set_grad(model, None) == 1


@pytest.mark.skipif(bool(TorchDEQCase.missing), reason="no TorchDEQ")
def test_torchdeq_keeps_what_it_was_given_and_nothing_is_said():
    case = TorchDEQCase()
    own, named = own_and_named(case)
    model = case.model(case.own)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dpp.set_grad(model, NAME)
    assert equal(case.gradients(model), named)
    assert not equal(own, named)
