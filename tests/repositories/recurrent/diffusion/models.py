"""A diffusion model with one block in a loop, as fixed-point-diffusion-models has it."""

import random
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional as F


class TimestepEmbedder(nn.Linear):
    @staticmethod
    def timestep_embedding(t, dim):
        return torch.cos(t[:, None].float() * torch.arange(dim))

    def forward(self, t):
        return super().forward(self.timestep_embedding(t, self.in_features))


class LabelEmbedder(nn.Embedding):
    """Some labels are dropped in training."""

    def forward(self, y):
        dropped = torch.rand(y.shape) < 0.3 * self.training
        return super().forward(torch.where(dropped, self.num_embeddings - 1, y))


class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x, c):
        return torch.tanh(self.linear(x) + c[:, None] + x.mean(1, keepdim=True))


class DiT(nn.Module):
    def __init__(
        self,
        input_size,
        patch_size,
        hidden_size,
        num_heads,
        num_classes=3,
        depth=1,
        in_channels=4,
        learn_sigma=False,
        use_gradient_checkpointing=False,
        fixed_point=False,
        fixed_point_no_grad_min_iters=0,
        fixed_point_no_grad_max_iters=0,
        fixed_point_with_grad_min_iters=2,
        fixed_point_with_grad_max_iters=2,
        fixed_point_reuse_solution=False,
        adaptive=False,
        iteration_controller=None,
    ):
        super().__init__()
        self.embed = nn.Linear(in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size, hidden_size)
        self.y_embedder = LabelEmbedder(num_classes + 1, hidden_size)
        self.fixed_point = fixed_point
        self.block_pre_projection = nn.Linear(hidden_size, hidden_size)
        self.block_fixed_point_projection_fc1 = nn.Linear(2 * hidden_size, hidden_size)
        self.block_fixed_point_projection_fc2 = nn.Linear(hidden_size, hidden_size)
        self.block_fixed_point = Block(hidden_size)
        self.head = nn.Linear(hidden_size, in_channels)
        if self.fixed_point:
            self.fixed_point_no_grad_min_iters = fixed_point_no_grad_min_iters
            self.fixed_point_no_grad_max_iters = fixed_point_no_grad_max_iters
            self.fixed_point_with_grad_min_iters = fixed_point_with_grad_min_iters
            self.fixed_point_with_grad_max_iters = fixed_point_with_grad_max_iters
            self.fixed_point_reuse_solution = fixed_point_reuse_solution
            self.last_solution = None
            self.adaptive = adaptive
            self.iteration_controller = iteration_controller

    def _forward_fixed_point_blocks(self, x, x_input_injection, c, num_iterations):
        def forward_pass(x):
            x = self.block_fixed_point_projection_fc1(torch.cat([x, x_input_injection], -1))
            x = self.block_fixed_point_projection_fc2(F.gelu(x, approximate="tanh"))
            return self.block_fixed_point(x, c)

        if self.adaptive:
            num_iterations = self.iteration_controller.get()
        for _ in range(num_iterations):
            x = forward_pass(x)
        return x

    def _forward_fixed_point(self, x, t, y):
        x = self.embed(x.flatten(2).transpose(1, 2))
        c = self.t_embedder(t) + self.y_embedder(y)
        start = x.clone()
        reused = self.fixed_point_reuse_solution and self.last_solution is not None
        init_solution = self.last_solution if reused else start
        x_input_injection = self.block_pre_projection(x)
        with nullcontext():
            begin, end = self.fixed_point_no_grad_min_iters, self.fixed_point_no_grad_max_iters
            cut = init_solution.detach(), x_input_injection.detach()
            x = self._forward_fixed_point_blocks(*cut, c, random.randint(begin, end))
            x = x.detach()
        begin, end = self.fixed_point_with_grad_min_iters, self.fixed_point_with_grad_max_iters
        number = random.randint(begin, end)
        x = self._forward_fixed_point_blocks(x, x_input_injection, c, number)
        if self.fixed_point_reuse_solution:
            self.last_solution = x.clone()
        return self.head(x).transpose(1, 2)

    def reset(self):
        self.last_solution = None

    def forward(self, x, t, y):
        return self._forward_fixed_point(x, t, y)


DiT_models = {}
