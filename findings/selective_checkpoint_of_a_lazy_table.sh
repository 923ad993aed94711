#!/usr/bin/env bash
# torch 2.13.0 (PyPI): selective activation checkpointing
# (torch.utils.checkpoint.create_selective_checkpoint_contexts) gives a silently wrong gradient where
# the region does one kept operation more in its first run than in its second, as a module does that
# makes a table at its first use. Ordinary checkpointing of the same region is right.
#
# The results that are kept are handed out by their number. One that the second run does not ask for
# moves all behind it. Shapes are compared, so a table of another shape than the batch is a
# CheckpointError. Here the batch has as many rows as the table.
#
# Expected: the gradient of the plain region, or an error. Seen (relative error of the gradient of
# the weight in the first step and in the second, which makes no table; no error, no warning):
#
#   plain             0e+00  0e+00
#   checkpoint        0e+00  0e+00
#   selective         8e-01  0e+00
#
# Exit status 0 if that is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat >"$folder/table.py" <<'PYTHON'
import functools
import warnings

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

warnings.simplefilter("error")


def policy(context, operator, *args, **kwargs):
    keep = operator == torch.ops.aten.mm.default
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(8, 8) / 3)
        self.basis, self.table = torch.randn(8, 8), None

    def forward(self, x):
        if self.table is None:
            self.table = self.basis @ self.basis.T / 8
        return torch.tanh(torch.tanh(x @ self.weight) @ self.table)


def region(layer, how):
    if how == "plain":
        return layer
    options = {"use_reentrant": False}
    if how == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)
    return lambda x: checkpoint(layer, x, **options)


x = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))


def two_steps(how):
    layer = Layer()
    return [
        torch.autograd.grad(region(layer, how)(x).square().sum(), layer.weight)[0] for _ in range(2)
    ]


wanted, found = two_steps("plain")[0], {}
for how in ("plain", "checkpoint", "selective"):
    found[how] = [float((g - wanted).norm() / wanted.norm()) for g in two_steps(how)]
    print(f"{how:12}", *(f"{error:.0e}" for error in found[how]))
right = all(max(found[how]) < 1e-5 for how in ("plain", "checkpoint"))
same = right and found["selective"][0] > 0.1 and found["selective"][1] < 1e-5
raise SystemExit(0 if same else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/table.py"
