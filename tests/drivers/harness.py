"""Builds a foreign model from its own code, trains it, and says what happened, as JSON.

Run in the folder of a code base, with or without `deq-phantom`:

    python harness.py DRIVER --name upg --steps 10 --out grads.pt

A driver is a file beside this one with `build() -> (model, loss)`; `loss()` runs the model in
training mode on fixed data of the right shape and returns a scalar.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import torch

parser = argparse.ArgumentParser()
parser.add_argument("driver")
parser.add_argument("--name", help="the strategy whose calls are counted")
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--double", action="store_true")
parser.add_argument("--own", action="store_true", help="the code base's own gradient")
parser.add_argument("--out", help="a file for the gradients of the first step")
args = parser.parse_args()
sys.argv = sys.argv[:1]
torch.set_num_threads(1)
torch.manual_seed(0)
if args.double:
    torch.set_default_dtype(torch.float64)
if args.own:
    from deq_phantom_plugin.patching import compat

    compat.apply("cpu", "linalg", "torch_sparse")
calls = []
if args.name:
    from deq_phantom_plugin.strategies.registry import strategy_class

    cls = strategy_class(args.name)
    attach = cls.attach

    def counted(*arguments, **named):
        calls.append(1)
        return attach(*arguments, **named)

    cls.attach = counted

sys.path.insert(0, str(Path.cwd()))
spec = importlib.util.spec_from_file_location(
    "driver", Path(__file__).with_name(f"{args.driver}.py")
)
driver = importlib.util.module_from_spec(spec)
spec.loader.exec_module(driver)
model, loss = driver.build()
model.train()
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
losses = []
for step in range(args.steps):
    torch.manual_seed(step)
    optimizer.zero_grad()
    value = loss()
    value.backward()
    if step == 0:
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if args.out:
            torch.save(grads, args.out)
    optimizer.step()
    losses.append(value.item())
finite = all(p.isfinite().all() for p in model.parameters())
print(
    "RESULT",
    json.dumps(
        {"losses": losses, "grads": sorted(grads), "calls": len(calls), "finite": bool(finite)}
    ),
)
