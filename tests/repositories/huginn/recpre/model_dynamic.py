import torch
from torch import nn


class RecurrentGPT(nn.Module):
    def __init__(self, config, objective, gradient_checkpointing=False):
        super().__init__()
        self.config = config
        n, size = config.n_embd, config.vocab_size
        parts = {
            "wte": nn.Embedding(size, n),
            "core": nn.Linear(2 * n, n),
            "ln_f": nn.LayerNorm(n),
            "head": nn.Linear(n, size),
        }
        self.transformer = nn.ModuleDict(parts)
        self.objective = objective
        self.gradient_checkpointing = gradient_checkpointing
        self.step = 0

    def forward(self, input_ids, labels, num_steps_pair=None):
        x, n, k, xk = self.iterate_forward(
            self.transformer.wte(input_ids), None, None, num_steps_pair
        )
        self.latest_metrics = {"steps": [int(n), int(k)], "before": float(xk.sum())}
        logits = self.transformer.head(x)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}

    def iterate_forward(self, input_embeds, freqs_cis, mask, num_steps_pair=None):
        x = torch.randn_like(input_embeds)
        if num_steps_pair is None:
            num_steps_no_grad, num_steps_with_grad = self.randomized_iteration_sampler()
        else:
            num_steps_no_grad, num_steps_with_grad = num_steps_pair
        offset = 0

        with torch.no_grad():
            for step in range(num_steps_no_grad):
                xk = x
                x = self.core_block_forward(xk, input_embeds, freqs_cis, mask, step + offset)

        for step in range(num_steps_with_grad):
            xk = x
            step = num_steps_no_grad + step + offset
            if (
                self.gradient_checkpointing
                and "per-iteration" in self.config.activation_checkpoint_impl
            ):
                x = self.config.checkpoint(
                    self.core_block_forward, xk, input_embeds, freqs_cis, mask, step
                )
            else:
                x = self.core_block_forward(xk, input_embeds, freqs_cis, mask, step)
        return self.transformer.ln_f(x), num_steps_no_grad, num_steps_with_grad, xk.detach()

    def core_block_forward(self, x, input_embeds, freqs_cis, mask, step):
        if self.config.noise > 0:
            x = x + torch.randn_like(x) * self.config.noise / torch.as_tensor(step + 1)
        return torch.tanh(self.transformer.core(torch.cat([x, input_embeds], -1)))

    def randomized_iteration_sampler(self):
        generator = torch.Generator().manual_seed(self.step)
        rate = float(self.config.mean_recurrence - self.config.mean_backprop_depth)
        n = torch.poisson(torch.tensor([rate]), generator=generator).long()
        k = torch.randint(1, 2 * self.config.mean_backprop_depth, (1,), generator=generator)
        return n, k
