#!/usr/bin/env bash
# torch 2.13.0 (PyPI), Inductor on the CPU: with `torch._functorch.config.donated_buffer = False`, which
# is what the error about donated buffers advises, products with the Jacobian of one compiled graph
# are wrong where Inductor's cache on disk was filled by a process with default settings.
#
# A backward pass compiled with donated buffers writes over what was saved for it. The key of the
# cache of compiled graphs (FxGraphCache) does not tell such code from code that must not; that of
# AOTAutogradCache does, misses, and Inductor then takes the other process' code. Expected: three
# equal products, an error of rounding each. Seen (relative errors of three products over one graph,
# retain_graph=True; no error, no warning):
#
#   empty cache     2e-07  2e-07  2e-07
#   filled cache    2e-07  1e+00  8e-01
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


if sys.argv[1] == "fill":  # default settings, one backward pass
    products(torch.compile(func), 1)
else:
    torch._functorch.config.donated_buffer = False
    pairs = zip(products(func, 3), products(torch.compile(func), 3))
    errors = [float((got - want).norm() / want.norm()) for want, got in pairs]
    print(f"{sys.argv[1]} cache:", *(f"{error:.0e}" for error in errors))
    wrong = [error > 0.1 for error in errors]
    same = wrong == [False, sys.argv[1] == "filled", sys.argv[1] == "filled"]
    sys.exit(0 if same else "the behaviour has changed")
PYTHON
run() { TORCHINDUCTOR_CACHE_DIR="$folder/$1" "$folder/venv/bin/python" "$folder/products.py" "$2"; }
run empty empty
run filled fill
run filled filled
