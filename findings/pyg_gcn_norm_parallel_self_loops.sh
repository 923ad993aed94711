#!/usr/bin/env bash
# torch_geometric 2.8.1 (PyPI), torch 2.13.0: gcn_norm with a node that has several self-loops keeps
# the weight of the last one, and drops the others, so that the result does not depend on them. Their
# gradient by autograd is not zero: each gets that of the one that was kept. Weighted graphs that
# are trained in their edge weights take wrong steps there, without a word.
#
# Seen, for self-loops of weights 1 and 2 at node 0 and an edge of weight 3 from node 0 to node 1, the
# gradient of the sum of squares of the normalised weights:
#
#   autograd             -0.5625  -0.5625   0.4375
#   central differences   0.0000  -0.5625   0.4375
#
# Exit status 0 if that is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 torch_geometric==2.8.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from torch_geometric.nn.conv.gcn_conv import gcn_norm

edges = torch.tensor([[0, 0, 0], [0, 0, 1]])
loss = lambda weight: gcn_norm(edges, weight, 2)[1].square().sum()
weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
(gradient,) = torch.autograd.grad(loss(weight), weight)
step = 1e-6 * torch.eye(3, dtype=torch.float64)
with torch.no_grad():
    slopes = torch.stack([(loss(weight + d) - loss(weight - d)) / 2e-6 for d in step])
for name, numbers in (("autograd", gradient), ("central differences", slopes)):
    print(f"{name:19}", "  ".join(f"{number:7.4f}" for number in numbers.tolist()))
same = torch.allclose(gradient[1:], slopes[1:], atol=1e-6) and abs(slopes[0]) < 1e-6
sys.exit(0 if same and abs(gradient[0] - gradient[1]) < 1e-12 else "the behaviour has changed")
PYTHON
