#!/usr/bin/env bash
# torchdeq 0.1.0 (PyPI), torch 2.13.0: the implicit gradient (ift=True) of an equilibrium with batch
# normalisation in training inside F depends on the backward solver, far beyond its tolerance.
#
# Its solvers follow each sample by itself and hand out the best iterate of each. Samples that batch
# normalisation couples are then taken from different iterates. Expected, and had with Anderson: the
# gradient of backpropagation through 200 iterations, to rounding. Seen, for a forward solve at 1e-13
# and b_tol=1e-12 (relative errors to that reference):
#
#   anderson          9e-14
#   fixed_point_iter  5.3e-02   (TorchDEQ's default backward solver; no warning)
#   broyden           nan       (no error)
#
# Exit status 0 if that is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 torchdeq==0.1.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import math
import sys

import torch
from torch import nn
from torchdeq import get_deq

weight = torch.linspace(0, 3, 7, dtype=torch.float64)[:, None]


def parts():
    torch.manual_seed(0)
    linear, norm = nn.Linear(4, 4).double(), nn.BatchNorm1d(4).double()
    x = torch.randn(7, 4, dtype=torch.float64)
    params = [*linear.parameters(), *norm.parameters()]
    return params, lambda h: torch.tanh(0.15 * norm(linear(h)) + x), torch.zeros_like(x)


def gradient(h, params):
    loss = (weight * h.square()).sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)])


params, func, h = parts()
for _ in range(200):
    h = func(h)
want = gradient(h, params)

errors = {}
for solver in ("anderson", "fixed_point_iter", "broyden"):
    params, func, start = parts()
    deq = get_deq(
        ift=True, f_solver="fixed_point_iter", f_max_iter=300, f_tol=1e-13,
        b_solver=solver, b_max_iter=300, b_tol=1e-12,
    )
    (h,), _ = deq(func, start)
    errors[solver] = float((gradient(h, params) - want).norm() / want.norm())
    print(f"{solver:17} {errors[solver]:.1e}")
same = errors["anderson"] < 1e-10 and errors["fixed_point_iter"] > 1e-2 and math.isnan(errors["broyden"])
sys.exit(0 if same else "the behaviour has changed")
PYTHON
