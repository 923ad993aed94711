#!/usr/bin/env bash
# torchdeq 0.1.0 (PyPI), torch 2.13.0: with ift=True the gradient of a small loss is not the implicit one.
# By default the backward solve stops at an absolute residual of 1e-6 (b_stop_mode="abs"), however small
# dL/dh is. A mean over many elements, a small weight of the loss or samples that are fitted well make
# dL/dh so small that the solve stops at its first steps.
#
# Expected: the gradient of c L is c times that of L. Seen, for a map of spectral radius 0.99 in float64
# and dL/dh of norm about c per sample: cosine to the exact gradient, and norm over the exact norm
#
#   c       b_stop_mode="abs", the default     "rel"
#   1           1.00   1.00                1.00   1.00
#   1e-5        1.00   0.82                1.00   1.00
#   1e-7        0.45   0.03                1.00   1.00
#
# Nothing is said. Exit status 0 if that is still so.
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
torch.set_default_dtype(torch.float64)
n = 16
basis = torch.linalg.qr(torch.randn(n, n)).Q
weight = (basis @ torch.diag(torch.linspace(0.1, 0.99, n)) @ basis.T).requires_grad_()
x, v = torch.randn(4, n), torch.nn.functional.normalize(torch.randn(4, n), dim=1)


def func(h):
    return h @ weight + x


identity = torch.eye(n)
h = torch.linalg.solve(identity - weight.detach().T, x.T).T
exact = h.T @ torch.linalg.solve(identity - weight.detach(), v.T).T  # of sum(v * h)


def measured(mode, c):
    deq = get_deq(
        ift=True, f_solver="broyden", f_max_iter=200, f_tol=1e-12, b_max_iter=1000, b_stop_mode=mode
    )
    z = deq(func, torch.zeros_like(x))[0][-1]
    (found,) = torch.autograd.grad(c * (v * z).sum(), weight)
    cosine = torch.nn.functional.cosine_similarity(found.flatten(), exact.flatten(), dim=0)
    return float(cosine), float(found.norm() / (c * exact.norm()))


found = {}
for c in (1.0, 1e-5, 1e-7):
    for mode in ("abs", "rel"):
        found[mode, c] = measured(mode, c)
    print(f"{c:.0e}", *(f"{mode}: {found[mode, c][0]:.2f} {found[mode, c][1]:.2f}" for mode in ("abs", "rel")))
right = all(min(found["rel", c]) > 0.999 for c in (1.0, 1e-5, 1e-7)) and min(found["abs", 1.0]) > 0.999
wrong = found["abs", 1e-7][0] < 0.9 and found["abs", 1e-7][1] < 0.5
sys.exit(0 if right and wrong else "the behaviour has changed")
PYTHON
