from dataclasses import dataclass

import torch
from models.parts import Inner, Level, Recursive
from pydantic import BaseModel


@dataclass
class Carry:
    z_H: torch.Tensor
    z_L: torch.Tensor


class EqRConfig(BaseModel):
    vocab_size: int
    hidden_size: int
    H_cycles: int
    L_cycles: int
    forward_dtype: str = "bfloat16"
    noise_scale: float = 0.01


class Noisy(Level):
    def forward(self, hidden_states, input_injection):
        updated = super().forward(hidden_states, input_injection)
        return updated + self.noise_scale * torch.randn_like(updated)


class InnerNetwork(Inner):
    def __init__(self, config):
        super().__init__(config)
        self.L_level = Noisy(config.hidden_size)
        self.L_level.noise_scale = config.noise_scale

    def first(self, z):
        return Carry(z, -z)

    def latent_recursion(self, z_H, z_L, x, seq):
        for _ in range(self.config.L_cycles):
            z_L = self.L_level(z_L, z_H + x, **seq)
        return self.L_level(z_H, z_L, **seq), z_L

    def deep_recursion(self, z_H, z_L, x, seq):
        with torch.no_grad():
            for _ in range(self.config.H_cycles - 1):
                z_H, z_L = self.latent_recursion(z_H, z_L, x, seq)
        return self.latent_recursion(z_H, z_L, x, seq)

    def forward(self, carry, batch):
        x = self._input_embeddings(batch["inputs"])
        z_H, z_L = self.deep_recursion(carry.z_H, carry.z_L, x, {})
        return Carry(z_H.detach(), z_L.detach()), *self.heads(z_H)


class EqRModel(Recursive):
    def __init__(self, config_dict):
        super().__init__(InnerNetwork(EqRConfig(**config_dict)))
