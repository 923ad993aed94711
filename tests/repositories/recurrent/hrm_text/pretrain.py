"""Trains a model of config/arch/net: python pretrain.py hrm [arch.KEY=VALUE ...]."""

import importlib
import json
import sys
from types import SimpleNamespace

import torch
import yaml


def launch(config):
    torch.manual_seed(0)
    from models.lm_head import LMHead

    module, name = config.arch.name.split("@")
    settings = {"hidden_size": 4, "vocab_size": 5, **vars(config.arch)}
    model = getattr(importlib.import_module(f"models.{module}"), name)(settings)
    train_state = SimpleNamespace(model=LMHead(model, settings), step=0, total_steps=4)
    for _ in range(4):
        train_state.step += 1
        train_extra_args = train_state.model.compute_train_extra_args(train_state)
        train_state.model.zero_grad()
        _, logits = train_state.model(None, {"inputs": torch.arange(4)}, **train_extra_args)
        logits.logsumexp(-1).sum().backward()
        grads = [None if p.grad is None else p.grad.sum().item() for p in model.parameters()]
        yield [logits.sum().item(), *grads]


def main(arch, *changes):
    with open(f"config/arch/net/{arch}.yaml") as stream:
        found = yaml.safe_load(stream)
    for change in changes:
        key, value = change.removeprefix("arch.").split("=", 1)
        if key not in found:
            sys.exit(f"Could not override 'arch.{key}'")
        found[key] = yaml.safe_load(value)
    print(json.dumps([*launch(SimpleNamespace(arch=SimpleNamespace(**found)))]))


if __name__ == "__main__":
    main(*sys.argv[1:])
