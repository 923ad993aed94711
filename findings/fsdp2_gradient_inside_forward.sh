#!/usr/bin/env bash
# torch 2.13.0 (PyPI), FSDP2 (fully_shard) with two processes on gloo, CPU: a gradient that is taken
# inside of the forward pass, through one sharded layer and for its input alone, takes the gathered
# weights away from the modules around it, which are still running. What they do next fails, with an
# error that names neither FSDP nor the gradient.
#
# For FSDP2 the end of any backward pass is the end of the model's: all its modules go back to their
# shards. Models that take gradients inside (products of an implicit layer, guidance by an energy,
# penalties on gradients) run unsharded, or with the whole model in one group whose own weights are
# not needed after that, and stop where a layer has a group of its own.
# Expected: the same loss and gradients as in one process. Seen (x is the input of `layer`):
#
#   one group, and nothing after the gradient needs its weights        as one process
#   layer a group; the model's own `scale` is used after the gradient  RuntimeError: aten.mul.Tensor
#                                              got mixed torch.Tensor and DTensor
#   the same gradient after the model's forward pass                   as one process
#
# Exit status 0 if that is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 setuptools==80.9.0
cat >"$folder/inside.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))


class Model(nn.Module):
    def __init__(self, scales):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.scale = nn.Linear(8, 8), nn.Parameter(torch.full((8,), 2.0))
        self.scales = scales

    def forward(self, x):
        x = x.clone().requires_grad_()
        size = self.layer(x).square().sum()
        scaled = None if self.scales == "after" else self.scale * x.detach()
        if self.scales == "outside":
            return size, x, scaled
        (slope,) = torch.autograd.grad(size, x)
        return self.scale * slope if self.scales == "after" else scaled + slope


def loss(model, x):
    found = model(x)
    if model.scales == "outside":
        size, x, scaled = found
        found = scaled + torch.autograd.grad(size, x)[0]
    return found.square().sum()


x, failed = torch.ones(4, 8), False
for scales, groups in (("before", ()), ("after", ("layer",)), ("outside", ("layer",))):
    alone, sharded = Model(scales), Model(scales)
    loss(alone, x).backward()
    for name in groups:
        fully_shard(getattr(sharded, name), mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    try:
        loss(sharded, x).backward()
        error = (sharded.scale.grad.full_tensor() - alone.scale.grad).abs().max()
        seen = f"error of the gradient {float(error):.0e}"
        as_said = scales != "after" and float(error) < 1e-4
    except RuntimeError as reason:
        seen = f"{type(reason).__name__}: {str(reason)[:60]}"
        as_said = scales == "after" and "mixed torch.Tensor and DTensor" in str(reason)
    failed |= not as_said
    if dist.get_rank() == 0:
        print(f"groups {['model', *groups]}, scale used {scales}: {seen}", flush=True)
dist.destroy_process_group()
sys.exit(failed)
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" -m torch.distributed.run --standalone \
    --nproc-per-node 2 "$folder/inside.py" 2>&1 | grep -v -i warning
