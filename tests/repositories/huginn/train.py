"""Trains models for three steps each: python train.py '[[MODEL, SETTINGS, PAIR], ...]'."""

import json
import sys
from types import SimpleNamespace

import torch


def train_step(input_ids, labels, state, cfg):
    model = state["model"]
    state["microbatch_step"] += 1
    model.step = state["microbatch_step"]  # propagate this to the model
    model.zero_grad()
    named = {} if cfg.pair is None else {cfg.argument: torch.tensor(cfg.pair)}
    loss = model(input_ids, labels, **named)["loss"]
    loss.backward()
    grads = [p.grad.sum().item() for p in model.parameters()]
    return [loss.item(), *grads, model.latest_metrics, torch.get_rng_state().sum().item()]


def trained(name, settings, pair):
    torch.manual_seed(0)
    checkpointed = settings.pop("checkpointed", False)
    if name == "dynamic":
        from recpre.config_dynamic import RecurrentConfig
        from recpre.model_dynamic import RecurrentGPT

        config = RecurrentConfig(**settings)
        model = RecurrentGPT(config, {}, checkpointed)
    else:
        from recpre.raven_modeling_minimal import RavenConfig, RavenForCausalLM

        config = RavenConfig(**settings)
        model = RavenForCausalLM(config)
        model.gradient_checkpointing = checkpointed
    argument = "num_steps_pair" if name == "dynamic" else "num_steps"
    cfg = SimpleNamespace(model_config=config, max_steps=3, pair=pair, argument=argument)
    state = {"model": model, "microbatch_step": 0}
    ids = torch.arange(8).view(2, 4) % 5
    return [train_step(ids, ids.roll(1, 1), state, cfg) for _ in range(3)]


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    print(json.dumps([trained(*job) for job in json.loads(sys.argv[1])]))
