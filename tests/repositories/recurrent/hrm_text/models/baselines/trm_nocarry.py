from typing import Optional  # noqa: F401  # which a patch uses

import torch
from models.transformer import Recurrent, TransformerConfig, first
from torch import nn


class TinyRecursiveModelConfig(TransformerConfig):
    H_cycles: int
    L_cycles: int
    H_bp_steps: int
    L_bp_steps: int


class TinyRecursiveModel(nn.Module):
    def __init__(self, config_dict):
        super().__init__()
        config = TinyRecursiveModelConfig(**config_dict)
        self.L_level = Recurrent(config)
        self.H_cycles, self.L_cycles = config.H_cycles, config.L_cycles
        self.H_bp_steps, self.L_bp_steps = config.H_bp_steps, config.L_bp_steps
        self.zL_init = nn.Buffer(first(config))

    def create_cache(self, **size):
        numbers = {"H": self.H_cycles, "L": self.H_cycles * self.L_cycles}
        return {
            n: [self.L_level.create_cache(**size) for _ in range(k)] for n, k in numbers.items()
        }

    def forward(self, carry, x, cache=None, **seq_info):
        z_H, z_L = x, self.zL_init
        total, on = self.H_cycles * self.L_cycles, torch.is_grad_enabled()
        for i in range(self.H_cycles):
            for k in range(i * self.L_cycles, (i + 1) * self.L_cycles):
                with torch.set_grad_enabled(on and k >= total - self.L_bp_steps):
                    z_L = self.L_level(z_L, z_H, cache=cache and cache["L"][k], **seq_info)
            with torch.set_grad_enabled(on and i >= self.H_cycles - self.H_bp_steps):
                z_H = self.L_level(z_H, z_L, cache=cache and cache["H"][i], **seq_info)
        return None, z_H

    def compute_train_extra_args(self, train_state):
        return {}
