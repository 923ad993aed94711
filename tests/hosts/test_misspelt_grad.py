"""Frameworks that take settings of any name: a misspelt `grad` is said."""

import argparse
import warnings

import numpy as np
import pytest
import torch

import deq_phantom_plugin as dpp
from host_cases import HrmTextCase

SAID = r"TorchDEQ knows no setting {}='{}' and passes it over"


@pytest.fixture
def enabled():
    pytest.importorskip("torchdeq")
    dpp.enable("torchdeq")


@pytest.mark.parametrize(
    "name", ["gard", "grads", "gradient", "grad_method", "phantom_grad", "GRAD"]
)
@pytest.mark.parametrize("spec", ["upg", "ift"])
def test_torchdeq_says_a_name_that_it_does_not_know(enabled, name, spec):
    import torchdeq

    with pytest.warns(dpp.AssumptionWarning, match=SAID.format(name, spec)) as seen:
        deq = torchdeq.get_deq(**{name: spec})
        torchdeq.get_deq(argparse.Namespace(**{name: spec}))
    assert len(seen) == 1
    assert f"grad='{spec}'" in str(seen[0].message)
    layer = torch.nn.Linear(4, 4)
    deq(lambda h: torch.tanh(0.1 * layer(h)), torch.ones(2, 4))[0][-1].sum().backward()
    assert layer.weight.grad is not None  # TorchDEQ's own gradient


@pytest.mark.parametrize(
    "settings",
    [
        {"gard": "upg", "grad": "npg"},  # the gradient is named
        {"phantom_grad": 1},
        {"phantom_grad": "yes"},
        {"grad_clip": 0.1, "gradient_checkpointing": True, "grade": None},
        {"f_solver": "anderson", "name": "upg", "method": "exact"},
        {"gradient_clipping": "auto", "grad_clip": "auto", "grid": "auto", "grade": "exact"},
        {"phantom_grad": [], "gradients": ["upg", 5, "other"]},
    ],
)
def test_nothing_is_said_of_other_settings(enabled, settings):
    import torchdeq

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torchdeq.get_deq(**settings)


def test_a_list_and_an_ambiguous_value_are_said_too(enabled):
    import torchdeq

    with pytest.warns(dpp.AssumptionWarning, match=r"grads=\['upg', 'jfb'\]"):
        torchdeq.get_deq(grads=["upg", "jfb"])
    with pytest.warns(dpp.AssumptionWarning, match="gard='auto'"):
        torchdeq.get_deq(gard="auto")


def test_names_that_are_no_strings_are_left_alone(enabled):
    import torchdeq

    torchdeq.get_deq({1: 2, None: "upg"})


@pytest.mark.parametrize("value", [np.arange(3), torch.arange(3), [np.arange(3)], object()])
@pytest.mark.parametrize("name", ["indices", "grads"])
def test_values_that_do_not_compare_with_a_text_are_left_alone(enabled, name, value):
    import torchdeq

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torchdeq.get_deq(**{name: value})


def test_nothing_is_said_where_the_host_is_disabled(enabled):
    import torchdeq

    dpp.disable("torchdeq")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torchdeq.get_deq(gard="upg")


def test_hrm_text_says_it_too():
    pytest.importorskip("transformers.models.hrm_text")
    from transformers import HrmTextForCausalLM

    dpp.enable("hrm_text")
    with pytest.warns(dpp.AssumptionWarning, match="Transformers knows no setting gard='npg'"):
        HrmTextForCausalLM(HrmTextCase.config(gard="npg"))
