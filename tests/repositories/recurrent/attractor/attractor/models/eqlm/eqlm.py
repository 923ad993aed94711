"""A language model whose last block is iterated to a fixed point, as in Attractor."""

import contextlib

import torch
from torch import nn


class _IFTAttach:
    """Solves for the adjoint of y = f(y) in a hook."""

    def __init__(self, config, y, image):
        self.config, self.y, self.image = config, y, image

    def product(self, u):
        return torch.autograd.grad(self.image, self.y, u, retain_graph=True)[0]

    def __call__(self, v):
        u, config = v, self.config
        if config.backward_type == "onestep":
            step = self.product(v)
            if config.adjoint_grad_clip is not None:
                longest = config.adjoint_grad_clip * v.flatten(1).norm(dim=1)
                scale = longest / step.flatten(1).norm(dim=1).clamp_min(1e-12)
                step = step * scale.clamp(max=1)[:, None, None]
            return v + step
        for _ in range(config.backward_max_iter):
            before, u = u, self.product(u) + v
            if (u - before).norm() < config.backward_tol * u.norm():
                break
        return u


class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.inside, self.out = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x, freqs_cis):
        seen = x.cumsum(1) / 4 + freqs_cis
        return x + 0.3 * self.out(torch.tanh(self.inside(seen)))


class EQLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        prelude, core_block = (nn.ModuleList([Block(config.n_embd)]) for _ in range(2))
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.transformer = nn.ModuleDict({"prelude": prelude, "core_block": core_block})
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)
        self.register_buffer("freqs_cis", torch.linspace(0, 1, config.block_size)[None, :, None])
        self.step = 0

    @contextlib.contextmanager
    def _deterministic_fp(self):
        self.transformer.core_block.eval()
        yield
        self.transformer.core_block.train(self.training)

    def _f(self, y, c, freqs_cis, attention_mask):
        h = y + c
        for block in self.transformer.core_block:
            h = block(h, freqs_cis)
        return h - y

    def _attach_implicit_grad(self, y_star, c, freqs_cis, attention_mask):
        y = y_star.detach().requires_grad_()
        with self._deterministic_fp():
            image = self._f(y, c, freqs_cis, attention_mask)
        if not image.requires_grad:
            return y_star
        attached = image.view_as(image)
        attached.register_hook(_IFTAttach(self.config, y, image))
        return y_star + (attached - attached.detach())

    def _refine(self, c, freqs_cis, attention_mask):
        y_star_ng = c.detach()
        with torch.no_grad(), self._deterministic_fp():
            for _ in range(self.config.max_iter):
                y_star_ng = self._f(y_star_ng, c, freqs_cis, attention_mask)
        y_star = self._attach_implicit_grad(y_star_ng, c, freqs_cis, attention_mask)
        return y_star

    def forward(self, input_ids, return_logits=True):
        freqs_cis = self.freqs_cis[:, : input_ids.shape[1]]
        c = self.embed(input_ids)
        for block in self.transformer.prelude:
            c = block(c, freqs_cis)
        return {"logits": self.lm_head(self._refine(c, freqs_cis, None))}
