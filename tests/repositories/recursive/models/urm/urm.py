from dataclasses import dataclass

import torch
from models.parts import Inner, Level, Recursive
from pydantic import BaseModel
from torch import nn


@dataclass
class Carry:
    current_hidden: torch.Tensor


class URMConfig(BaseModel):
    vocab_size: int
    hidden_size: int
    H_cycles: int
    L_cycles: int
    forward_dtype: str = "bfloat16"


class URM_Inner(Inner):
    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList([Level(config.hidden_size) for _ in range(2)])

    def first(self, z):
        return Carry(z)

    def forward(self, carry, batch):
        seq_info = {}
        input_embeddings = self._input_embeddings(batch["inputs"])
        hidden_states = carry.current_hidden
        with torch.no_grad():
            for _ in range((self.config.H_cycles - 1) * self.config.L_cycles):
                hidden_states = hidden_states + input_embeddings
                for layer in self.layers:
                    hidden_states = layer(hidden_states=hidden_states, **seq_info)
        for _ in range(self.config.L_cycles):
            hidden_states = hidden_states + input_embeddings
            for layer in self.layers:
                hidden_states = layer(hidden_states=hidden_states, **seq_info)
        return Carry(hidden_states.detach()), *self.heads(hidden_states)


class URM(Recursive):
    def __init__(self, config_dict):
        super().__init__(URM_Inner(URMConfig(**config_dict)))
