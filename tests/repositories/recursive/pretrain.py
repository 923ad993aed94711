"""Trains a model of config/arch: python pretrain.py arch=trm [arch.KEY=VALUE ...].

As Hydra has it, a key that is not in the file is refused.
"""

import importlib
import json
import sys
from types import SimpleNamespace

import torch
import yaml


def configuration(arch, **changes):
    with open(f"config/arch/{arch}.yaml") as stream:
        found = yaml.safe_load(stream)
    for key, value in changes.items():
        if key not in found:
            sys.exit(f"Could not override 'arch.{key}'")
        found[key] = yaml.safe_load(value)
    return found


def train_batch(config, train_state, batch):
    train_state.step += 1
    if train_state.step > train_state.total_steps:
        return None
    train_state.model.zero_grad()
    torch.manual_seed(0)
    carry = train_state.carry
    train_state.carry, loss, *_ = train_state.model(return_keys=[], carry=carry, batch=batch)
    loss.backward()
    return [loss.item(), *(p.grad.sum().item() for p in train_state.model.parameters())]


def main(arch, *changes):
    from models.losses import ACTLossHead

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    changes = dict(change.removeprefix("arch.").split("=", 1) for change in changes)
    config = configuration(arch.removeprefix("arch="), **changes)
    module, name = config["name"].split("@")
    model = getattr(importlib.import_module(f"models.{module}"), name)(config)
    batch = {"inputs": torch.arange(8).view(2, 4) % 5, "labels": torch.arange(8).view(2, 4) % 3}
    head = ACTLossHead(model, "softmax_cross_entropy")
    state = SimpleNamespace(model=head, carry=head.initial_carry(batch), step=0, total_steps=3)
    settings = SimpleNamespace(arch=SimpleNamespace(**config))
    print(json.dumps([train_batch(settings, state, batch) for _ in range(3)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
