"""What the small models are made of."""

import torch
from torch import nn


class Level(nn.Module):
    """A layer whose weights take the dtype of what they are given."""

    def __init__(self, size, out=None):
        super().__init__()
        self.linear = nn.Linear(size, out or size)

    def forward(self, hidden_states, input_injection=0.0, **kwargs):
        x = hidden_states + input_injection
        weight, bias = (p.to(x.dtype) for p in (self.linear.weight, self.linear.bias))
        return torch.tanh(nn.functional.linear(x, weight, bias))


class Inner(nn.Module):
    """An embedding before the loop, two heads behind it."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.dtype = getattr(torch, config.forward_dtype)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.q_head = nn.Linear(config.hidden_size, 2)

    def _input_embeddings(self, inputs):
        return self.embed_tokens(inputs).to(self.dtype)

    def heads(self, z):
        z = z.to(self.lm_head.weight.dtype)
        return self.lm_head(z), self.q_head(z[:, 0])[:, 0]


class Recursive(nn.Module):
    """A model around an inner one, which carries its state."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def initial_carry(self, batch):
        config = self.inner.config
        shape = (*batch["inputs"].shape, config.hidden_size)
        return self.inner.first(torch.full(shape, 0.5, dtype=self.inner.dtype))

    def forward(self, carry, batch):
        carry, logits, halt = self.inner(carry, batch)
        return carry, {"logits": logits, "q_halt_logits": halt}
