from typing import Optional  # noqa: F401  # which a patch uses

import torch
from models.transformer import Recurrent, TransformerConfig, first
from torch import nn


class UniversalTransformerConfig(TransformerConfig):
    cycles: int
    bp_cycles: int


class UniversalTransformer(nn.Module):
    def __init__(self, config_dict):
        super().__init__()
        config = UniversalTransformerConfig(**config_dict)
        self.L_level = Recurrent(config)
        self.cycles, self.bp_cycles = config.cycles, config.bp_cycles
        self.zL_init = nn.Buffer(first(config))

    def create_cache(self, **size):
        return [self.L_level.create_cache(**size) for _ in range(self.cycles)]

    def forward(self, carry, x, cache=None, **seq_info):
        z, on = self.zL_init, torch.is_grad_enabled()
        for i in range(self.cycles):
            with torch.set_grad_enabled(on and i >= self.cycles - self.bp_cycles):
                z = self.L_level(z, x, cache=cache and cache[i], **seq_info)
        return None, z

    def compute_train_extra_args(self, train_state):
        return {}
