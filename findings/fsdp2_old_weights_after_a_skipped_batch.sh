#!/usr/bin/env bash
# torch 2.13.0 (PyPI), FSDP2 (fully_shard) with two processes on gloo, CPU: after an exception in a
# forward pass that all processes catch, such as that of a check for a bad batch, the next forward
# pass takes the weights that were gathered in the one that failed. An optimiser's step in between
# goes unseen, in those modules alone that had gathered their weights. No error, no warning.
#
# `model.reset_iter_state()` after the exception is the cure; nothing points to it when it is left
# out. Expected: the output of one process, or an error. Seen (gradients of one good batch, then a
# bad one that is left out, then an optimiser's step; largest difference of the next output):
#
#   to one process, without reset_iter_state()       1e-01, of a change of 4e-01 by the step
#   to one process, with it                          0e+00
#
# Exit status 0 if that is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 setuptools==80.9.0
cat >"$folder/skipped.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x):
        h = self.layer(x)
        if not h.isfinite().all():
            raise ValueError("a batch with a NaN")
        return self.head(h)


def outputs(sharded, tidies):
    """Accumulate over a good batch and a bad one, which is left out; step; look at the next."""
    model = Model()
    if sharded:
        fully_shard(model.layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for batch in (torch.ones(4, 8), torch.full((4, 8), float("nan"))):
        try:
            model(batch).square().mean().backward()
        except ValueError:
            if tidies:
                model.reset_iter_state()
    optimizer.step()
    return model(torch.ones(4, 8)).detach()


right, before = outputs(sharded=False, tidies=False), Model()(torch.ones(4, 8)).detach()
change = (right - before).abs().max()
errors = []
for tidies in (False, True):
    errors.append((outputs(sharded=True, tidies=tidies) - right).abs().max())
    if dist.get_rank() == 0:
        said = "with" if tidies else "without"
        print(f"{said} reset_iter_state(): {errors[-1]:.0e}, of a change of {change:.0e}", flush=True)
dist.destroy_process_group()
sys.exit(0 if errors[0] > 0.1 * change and errors[1] < 1e-5 else "the behaviour has changed")
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" -m torch.distributed.run --standalone \
    --nproc-per-node 2 "$folder/skipped.py" 2>&1 | grep -v -i warning
