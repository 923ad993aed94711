"""Two steps of training: python scripts/train.py [GRAD]."""

import importlib
import json
import sys
from types import SimpleNamespace

import torch


def train_step(state, cfg):
    model = state["model"]
    state["microbatch_step"] += 1
    model.step = state["microbatch_step"]
    logits = model(torch.tensor([[1, 2, 0]]))["logits"]
    logits.logsumexp(-1).sum().backward()
    state["optimizer_step"] += 1
    return [p.grad.sum().item() for p in model.parameters()]


def main(*grad):
    from attractor.models.attractor.config import AttractorConfig

    torch.manual_seed(0)
    settings = {"grad": None if grad[0] == "null" else grad[0]} if grad else {}
    config = AttractorConfig(4, 5, 4, 2, 4, **settings)
    module = importlib.import_module("attractor.models.attractor.attractor")
    state = {"model": module.Attractor(config), "microbatch_step": 0, "optimizer_step": 0}
    cfg = SimpleNamespace(model_config=config, max_steps=2)
    print(json.dumps([train_step(state, cfg) for _ in range(2)]))


if __name__ == "__main__":
    sys.path.insert(0, ".")
    main(*sys.argv[1:])
