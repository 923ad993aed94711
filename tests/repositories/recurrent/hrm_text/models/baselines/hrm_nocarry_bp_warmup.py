from typing import Optional  # noqa: F401  # which a patch uses

import torch
from models.transformer import Recurrent, TransformerConfig, first
from torch import nn


class HierarchicalReasoningModelConfig(TransformerConfig):
    H_cycles: int
    L_cycles: int
    bp_warmup_ratio: float = 0.0
    bp_min_steps: int = 2
    bp_max_steps: int = 5


class HierarchicalReasoningModel(nn.Module):
    def __init__(self, config_dict):
        super().__init__()
        config = HierarchicalReasoningModelConfig(**config_dict)
        self.config = config
        self.H_level, self.L_level = Recurrent(config), Recurrent(config)
        self.H_cycles, self.L_cycles = config.H_cycles, config.L_cycles
        self.zL_init = nn.Buffer(first(config))

    def create_cache(self, **size):
        numbers = {"H": self.H_cycles, "L": self.H_cycles * self.L_cycles}
        return {
            n: [self.H_level.create_cache(**size) for _ in range(k)] for n, k in numbers.items()
        }

    def forward(self, carry, x, cache=None, bp_steps=2, **seq_info):
        z_H, z_L = x, self.zL_init
        H_bp_steps = min(self.H_cycles, bp_steps - 1)
        L_bp_steps = bp_steps - H_bp_steps
        total, on = self.H_cycles * self.L_cycles, torch.is_grad_enabled()
        for i in range(self.H_cycles):
            for k in range(i * self.L_cycles, (i + 1) * self.L_cycles):
                with torch.set_grad_enabled(on and k >= total - L_bp_steps):
                    z_L = self.L_level(z_L, z_H, cache=cache and cache["L"][k], **seq_info)
            with torch.set_grad_enabled(on and i >= self.H_cycles - H_bp_steps):
                z_H = self.H_level(z_H, z_L, cache=cache and cache["H"][i], **seq_info)
        return None, z_H

    def compute_train_extra_args(self, train_state):
        end = train_state.total_steps * self.config.bp_warmup_ratio
        progress = min(1.0, train_state.step / end) if end else 1.0
        grown = int(progress * (self.config.bp_max_steps - self.config.bp_min_steps))
        return {"bp_steps": self.config.bp_min_steps + grown}
