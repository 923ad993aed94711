from dataclasses import dataclass

import torch
from models.parts import Inner, Level, Recursive
from pydantic import BaseModel


@dataclass
class Carry:
    z_H: torch.Tensor
    z_L: torch.Tensor


class TinyRecursiveReasoningModel_ACTV1Config(BaseModel):
    vocab_size: int
    hidden_size: int
    H_cycles: int
    L_cycles: int
    forward_dtype: str = "bfloat16"


class TinyRecursiveReasoningModel_ACTV1_Inner(Inner):
    def __init__(self, config):
        super().__init__(config)
        self.L_level = Level(config.hidden_size)

    def first(self, z):
        return Carry(z, -z)

    def forward(self, carry, batch):
        seq_info = {}
        input_embeddings = self._input_embeddings(batch["inputs"])
        it = 0  # noqa: F841
        z_H, z_L = carry.z_H, carry.z_L
        with torch.no_grad():
            for _H_step in range(self.config.H_cycles - 1):
                for _L_step in range(self.config.L_cycles):
                    z_L = self.L_level(z_L, z_H + input_embeddings, **seq_info)
                z_H = self.L_level(z_H, z_L, **seq_info)
        for _L_step in range(self.config.L_cycles):
            z_L = self.L_level(z_L, z_H + input_embeddings, **seq_info)
        z_H = self.L_level(z_H, z_L, **seq_info)
        return Carry(z_H=z_H.detach(), z_L=z_L.detach()), *self.heads(z_H)


class TinyRecursiveReasoningModel_ACTV1(Recursive):
    def __init__(self, config_dict):
        config = TinyRecursiveReasoningModel_ACTV1Config(**config_dict)
        super().__init__(TinyRecursiveReasoningModel_ACTV1_Inner(config))
