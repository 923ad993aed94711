#!/usr/bin/env bash
# torch 2.13.0 (PyPI), Inductor on the CPU: a second product over one compiled graph
# (torch.autograd.grad(..., retain_graph=True) twice) is silently wrong where Inductor's cache holds
# the same backward pass compiled with donated buffers, which writes over what was saved for it.
#
# The key of AOTAutogradCache tells such code from code that must keep its buffers; that of
# FxGraphCache does not, so on a miss of the first Inductor takes the donating code all the same.
# Expected: three equal products, an error of rounding each. Seen (relative errors of three products
# over one graph; no error, no warning):
#
#   default settings, nothing compiled before                            2e-07  2e-07  2e-07
#   default settings, another lambda around the same code, used in a
#     pass that keeps no graph before                                    2e-07  1e+00  8e-01
#   donated_buffer=False (what PyTorch's error about donated buffers
#     advises), and the cache on disk of a process with the default      2e-07  1e+00  8e-01
#
# Needs a C++ compiler. Exit status 0 if that is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 setuptools==80.9.0
cat >"$folder/products.py" <<'PYTHON'
import sys

import torch
import torch._functorch.config

torch.manual_seed(0)
a, b = torch.nn.Linear(8, 32), torch.nn.Linear(32, 8)
u, h, v = (torch.randn(5, 8) for _ in range(3))


def func(h):
    return 0.3 * torch.tanh(b(torch.nn.functional.gelu(a(h))) + u)


def products(func, times):
    x = h.clone().requires_grad_()
    y = func(x)
    return [torch.autograd.grad(y, x, v, retain_graph=times > 1)[0] for _ in range(times)]


what = sys.argv[1]
if what == "fill":
    products(torch.compile(func), 1)
    sys.exit()
if what == "other":
    products(torch.compile(lambda z: func(z)), 1)
if what == "filled":
    torch._functorch.config.donated_buffer = False
pairs = zip(products(func, 3), products(torch.compile(func), 3))
errors = [float((got - want).norm() / want.norm()) for want, got in pairs]
print(f"{what:7}", *(f"{error:.0e}" for error in errors))
wrong = what != "nothing"
same = [error > 0.1 for error in errors] == [False, wrong, wrong]
sys.exit(0 if same else f"{what}: the behaviour has changed")
PYTHON
run() { TORCHINDUCTOR_CACHE_DIR="$folder/$1" "$folder/venv/bin/python" "$folder/products.py" "$2"; }
run 1 nothing
run 2 other
run 3 fill
run 3 filled
