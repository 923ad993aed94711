#!/usr/bin/env bash
# torchdeq 0.1.0 (PyPI), torch 2.13.0: a DEQIndexing that samples states on the way (`indexing`, `n_states`)
# trains an early iterate, and not the equilibrium, if its solver reaches its tolerance after the
# first sampled step. Evaluation has the equilibrium. So the better the solve, the further is what is
# trained from what is evaluated.
#
# The last state is taken from the sampled steps, and the last of these is f_max_iter, which a solve that
# stops early does not reach. Expected: states[-1] is the equilibrium, as in evaluation and as with
# core="sliced". Seen, as the relative residual of states[-1] with f_max_iter=40, f_tol=1e-9 and
# indexing=[2] (one step of the phantom gradient, F itself, comes on top of the sampled state):
#
#   solver             training       states   evaluation   sliced, training
#   fixed_point_iter   above 1e-4     1 of 2   below 1e-7   below 1e-7
#   broyden            above 1e-4     1 of 2   below 1e-7   below 1e-7
#
# Exit status 0 if that is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 torchdeq==0.1.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from torchdeq import get_deq

torch.manual_seed(0)
weight = 0.5 * torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
x = torch.randn(4, 6, dtype=torch.float64)
same = True


def func(h):
    return torch.tanh(h @ weight + x)


def residual(h):
    h = h.detach()
    return float((func(h) - h).norm() / func(h).norm())


for solver in ("fixed_point_iter", "broyden"):
    common = {"grad": 1, "f_solver": solver, "f_max_iter": 40, "f_tol": 1e-9, "indexing": [2]}
    deq, sliced = (get_deq(core=core, **common) for core in ("indexing", "sliced"))
    start = torch.zeros_like(x)
    trained, _ = deq.train()(func, start)
    evaluated, _ = deq.eval()(func, start)
    in_slices, _ = sliced.train()(func, start)
    found = [residual(states[-1]) for states in (trained, evaluated, in_slices)]
    print(solver, f"{len(trained)} of 2 states", *(f"{one:.1e}" for one in found))
    same &= len(trained) == 1 and found[0] > 1e-4 and found[1] < 1e-7 and found[2] < 1e-7
sys.exit(0 if same else "the behaviour has changed")
PYTHON
