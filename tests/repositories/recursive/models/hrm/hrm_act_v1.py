from dataclasses import dataclass

import torch
from models.parts import Inner, Level, Recursive
from pydantic import BaseModel


@dataclass
class Carry:
    z_H: torch.Tensor
    z_L: torch.Tensor


class HierarchicalReasoningModel_ACTV1Config(BaseModel):
    vocab_size: int
    hidden_size: int
    H_cycles: int
    L_cycles: int
    forward_dtype: str = "bfloat16"


class HierarchicalReasoningModel_ACTV1_Inner(Inner):
    def __init__(self, config):
        super().__init__(config)
        self.H_level = Level(config.hidden_size)
        self.L_level = Level(config.hidden_size)

    def first(self, z):
        return Carry(z, -z)

    def forward(self, carry, batch):
        seq_info = {}
        input_embeddings = self._input_embeddings(batch["inputs"])
        with torch.no_grad():
            z_H, z_L = carry.z_H, carry.z_L
            for step in range(self.config.H_cycles * self.config.L_cycles - 1):
                z_L = self.L_level(z_L, z_H + input_embeddings, **seq_info)
                if (step + 1) % self.config.L_cycles == 0:
                    z_H = self.H_level(z_H, z_L, **seq_info)
        assert not z_H.requires_grad
        z_L = self.L_level(z_L, z_H + input_embeddings, **seq_info)
        z_H = self.H_level(z_H, z_L, **seq_info)
        return Carry(z_H.detach(), z_L.detach()), *self.heads(z_H)


class HierarchicalReasoningModel_ACTV1(Recursive):
    def __init__(self, config_dict):
        config = HierarchicalReasoningModel_ACTV1Config(**config_dict)
        super().__init__(HierarchicalReasoningModel_ACTV1_Inner(config))
