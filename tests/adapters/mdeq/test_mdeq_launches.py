"""Operators that a training step of MDEQ dispatches, over TorchDEQ's: the same on any machine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchdeq")
sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
from suite.accounting import launches
from torchdeq import get_deq

from deq_phantom_plugin.adapters.mdeq import MDEQ

SOLVE = {"f_max_iter": 21, "f_tol": 0.0, "f_stop_mode": "rel"}
PEERS = {
    "upg(k=5, lam=0.5)": ({"grad": 5, "tau": 0.5}, 0.63),
    "ift(tol=1e-12, max_iter=24)": (
        {"ift": True, "b_solver": "broyden", "b_max_iter": 23, "b_tol": 0.0},
        0.55,
    ),
}


# Neither solve is asked whether it converged: the numbers of evaluations are to be the same.
@pytest.mark.filterwarnings("ignore::deq_phantom_plugin.ConvergenceWarning")
@pytest.mark.filterwarnings("ignore:h is no equilibrium")
@pytest.mark.parametrize("spec", PEERS)
def test_launches_of_a_training_step(spec):
    torch.manual_seed(0)
    model = MDEQ.from_preset("tiny", grad="upg").train()
    images = torch.randn(2, 3, 8, 8)
    options, most = PEERS[spec]

    def count(solver, **options):
        model.deq = get_deq(f_solver=solver, **SOLVE, **options).train()

        def step():
            model.zero_grad()
            model(images).square().sum().backward()

        step()  # at first it is found out what F is
        return launches(step)["launches"]

    assert count("broyden_fast", grad=spec) <= most * count("broyden", **options)
