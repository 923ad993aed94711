from typing import Optional  # noqa: F401  # which a patch uses

import torch
from models.transformer import Recurrent, TransformerConfig, first
from torch import nn


class RINSConfig(TransformerConfig):
    L_cycles: int
    L_bp_cycles: int


class RINS(nn.Module):
    def __init__(self, config_dict):
        super().__init__()
        config = RINSConfig(**config_dict)
        self.H_level, self.L_level = Recurrent(config), Recurrent(config)
        self.L_cycles, self.L_bp_cycles = config.L_cycles, config.L_bp_cycles
        self.zL_init = nn.Buffer(first(config))

    def create_cache(self, **size):
        low = [self.L_level.create_cache(**size) for _ in range(self.L_cycles)]
        return {"H": self.H_level.create_cache(**size), "L": low}

    def forward(self, carry, x, cache=None, **seq_info):
        z_L, on = self.zL_init, torch.is_grad_enabled()
        for i in range(self.L_cycles):
            with torch.set_grad_enabled(on and i >= self.L_cycles - self.L_bp_cycles):
                z_L = self.L_level(z_L, x, cache=cache and cache["L"][i], **seq_info)
        return None, self.H_level(z_L, None, cache=cache and cache["H"], **seq_info)

    def compute_train_extra_args(self, train_state):
        return {}
