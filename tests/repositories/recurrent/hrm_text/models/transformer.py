import torch
from pydantic import BaseModel
from torch import nn


class TransformerConfig(BaseModel):
    hidden_size: int


class Transformer(nn.Module):
    """A layer that sees the sum of all tokens so far; a cache holds that."""

    def __init__(self, config):
        super().__init__()
        self.inside, self.out = (nn.Linear(config.hidden_size, config.hidden_size) for _ in "12")

    def create_cache(self, max_batch_size, max_seq_len):
        return torch.zeros(max_batch_size, 1, self.inside.in_features)

    def forward(self, x, cache=None, **seq_info):
        seen = x.cumsum(-2)
        if cache is not None:
            seen = seen + cache
            cache.copy_(seen[..., -1:, :])
        return self.out(torch.tanh(x + self.inside(seen) / 4))


class Recurrent(Transformer):
    def forward(self, z, injection, **seq_info):
        return super().forward(z if injection is None else z + injection, **seq_info)


def first(config):
    return torch.linspace(-1, 1, config.hidden_size, dtype=torch.bfloat16)
