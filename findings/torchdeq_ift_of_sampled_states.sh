#!/usr/bin/env bash
# torchdeq 0.1.0 (PyPI), torch 2.13.0: with ift=True and sampled states, the equilibrium of a DEQIndexing
# whose solver stops before the first sampled step has the one-step gradient, and not the implicit one.
#
# Gradients go by the place of a state among those that were handed out, and the implicit one is the
# last of them all. A solve that reaches its tolerance early hands out fewer, so that the better the
# solve, the worse the gradient. Expected: the implicit gradient, as backpropagation through 400 steps
# has it. Seen (relative errors to that, and to one step from the equilibrium):
#
#   one state, no sampling               1e-13   1.1
#   n_states=3, solved before the first  0.60    2e-13   (one state handed out; no warning)
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
weight = (0.8 * torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q).requires_grad_()
x = torch.randn(4, 6, dtype=torch.float64)


def func(h):
    return torch.tanh(h @ weight + x)


def gradient(h):
    return torch.autograd.grad(h.square().sum(), weight)[0]


h = torch.zeros_like(x)
for _ in range(400):
    h = func(h)
implicit, one_step = gradient(h), gradient(func(h.detach()))
errors = []
for n_states in (1, 3):
    deq = get_deq(
        core="indexing", ift=True, n_states=n_states, f_solver="fixed_point_iter", f_max_iter=400,
        f_tol=1e-12, b_solver="fixed_point_iter", b_max_iter=400, b_tol=1e-12,
    )
    states, _ = deq.train()(func, torch.zeros_like(x))
    found = gradient(states[-1])
    errors += [float((found - want).norm() / want.norm()) for want in (implicit, one_step)]
    print(f"n_states={n_states}: {len(states)} handed out, {errors[-2]:.1e} {errors[-1]:.1e}")
same = errors[0] < 1e-9 and errors[2] > 0.1 and errors[3] < 1e-9
sys.exit(0 if same else "the behaviour has changed")
PYTHON
