#!/usr/bin/env bash
# torchdeq 0.1.0 (PyPI), torch 2.13.0: info["sradius"] of sradius_mode=True is not the spectral radius
# where the largest eigenvalues of df/dh are a complex pair, as they often are where f is a neural net.
#
# It is |v^T J^T v| / v^T v of the last vector v of a power iteration. With a complex pair v turns for
# ever and the quotient is the radius times the cosine of an angle. Expected: the radius. Seen:
#
#   J = r times a rotation by 90 degrees   r = 0.9: 0.00   r = 1.2, where no fixed-point iteration
#                                          converges: 0.00
#   by 45 degrees                          r = 0.9: 0.64
#   J a random matrix, 64 x 64, scaled to the radius 0.95, twelve draws, four samples each:
#                                          eight draws have a complex pair, and of them the means
#                                          over samples lie between 0.09 and 0.94
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
from torchdeq import get_deq

torch.set_default_dtype(torch.float64)


def sradius(weight):
    """What TorchDEQ says in each of four samples, of h W + x."""
    torch.manual_seed(0)
    n = len(weight)
    x = torch.linalg.solve(torch.eye(n) - weight.T, torch.ones(n, 4)).T  # an equilibrium, given as x
    deq = get_deq(f_solver="fixed_point_iter", f_max_iter=2).eval()
    _, info = deq(lambda h: (h - x) @ weight + x, x, sradius_mode=True)
    return info["sradius"]


def rotation(radius, degrees):
    a = math.radians(degrees)
    turn = [[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]
    return radius * torch.tensor(turn)


seen = {}
for radius, degrees in ((0.9, 90), (1.2, 90), (0.9, 45), (0.9, 0)):
    seen[radius, degrees] = sradius(rotation(radius, degrees)).mean().item()
    print(f"radius {radius}, rotation by {degrees} degrees: {seen[radius, degrees]:.2f}")
means = []
for seed in range(12):
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
    values = torch.linalg.eigvals(weight)
    top = values[values.abs().argmax()]
    if top.imag.abs() > 1e-9:
        means.append(sradius(0.95 * weight / top.abs()).mean().item())
print(f"random maps of radius 0.95 with a complex pair: {len(means)} of 12,", end=" ")
print(f"means between {min(means):.2f} and {max(means):.2f}")
flat = all(seen[r, 90] < 1e-3 for r in (0.9, 1.2))
less = abs(seen[0.9, 45] - 0.9 * math.cos(math.pi / 4)) < 1e-3 and abs(seen[0.9, 0] - 0.9) < 1e-3
sys.exit(0 if flat and less and min(means) < 0.5 else "the behaviour has changed")
PYTHON
