"""A layer whose backward pass is hard-wired, as in the repositories that we patch."""

from __future__ import annotations

import torch
from torch import autograd, nn


class Net(nn.Module):
    def __init__(self, size=4):
        super().__init__()
        self.linear = nn.Linear(size, size)
        self.hook = None  # so that it can be removed

    def forward(self, x):
        func = lambda z: torch.tanh(0.5 * self.linear(z) + x)  # noqa: E731
        with torch.no_grad():
            z = torch.zeros_like(x)
            for _ in range(100):
                z = func(z)
        if self.training:
            # the seam
            z.requires_grad_()
            new_z = func(z)

            def backward_hook(grad):
                if self.hook is not None:
                    self.hook.remove()
                g = grad
                for _ in range(100):
                    g = autograd.grad(new_z, z, g, retain_graph=True)[0] + grad
                return g

            self.hook = new_z.register_hook(backward_hook)
            return new_z
        return z
