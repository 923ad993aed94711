import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .raven_config_minimal import RavenConfig


class RavenPreTrainedModel(nn.Module):
    config_class = RavenConfig
    _tied_weights_keys = ("head.weight",)


class RavenForCausalLM(RavenPreTrainedModel):
    def __init__(self, config):
        super().__init__()
        self.config = config
        n, size = config.n_embd, config.vocab_size
        parts = {
            "wte": nn.Embedding(size, n),
            "adapter": nn.Linear(2 * n, n),
            "core_block": nn.ModuleList([nn.Linear(n, n), nn.Linear(n, n)]),
            "ln_f": nn.LayerNorm(n),
            "head": nn.Linear(n, size),
        }
        self.transformer = nn.ModuleDict(parts)
        self.gradient_checkpointing = False

    def forward(self, input_ids, labels, num_steps=None, past_key_values=None):
        x, n, k, xk, block_idx = self.iterate_forward(
            self.transformer.wte(input_ids),
            None,
            None,
            torch.tensor(0),
            None,
            past_key_values,
            num_steps,
        )
        self.latest_metrics = {"steps": [int(n), int(k), int(block_idx)], "before": float(xk.sum())}
        logits = self.transformer.head(x)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}

    def iterate_forward(
        self,
        input_embeds,
        input_states,
        freqs_cis,
        block_idx,
        mask,
        past_key_values=None,
        num_steps=None,
        init_scale=1.0,
    ):
        x = xk = (
            self.initialize_state(input_embeds, scale=init_scale)
            if input_states is None
            else input_states.clone()
        )
        if num_steps is None:
            num_steps_no_grad, num_steps_with_grad = self.randomized_iteration_sampler()
        elif hasattr(num_steps, "__len__") and len(num_steps) > 1:
            num_steps_no_grad, num_steps_with_grad = num_steps
        else:
            num_steps_no_grad, num_steps_with_grad = num_steps, torch.tensor(0)

        with torch.no_grad():
            for no_grad_step in range(num_steps_no_grad):
                xk = x
                x, block_idx = self.core_block_forward(
                    xk, input_embeds, freqs_cis, mask, past_key_values, block_idx, no_grad_step
                )

        for grad_step in range(num_steps_with_grad):
            xk = x
            x, block_idx = self._maybe_checkpoint_core_block(
                xk,
                input_embeds,
                freqs_cis,
                mask,
                past_key_values,
                block_idx,
                num_steps_no_grad + grad_step,
            )
        return (
            self.transformer.ln_f(x),
            num_steps_no_grad,
            num_steps_with_grad,
            xk.detach(),
            block_idx,
        )

    def core_block_forward(
        self, x, input_embeds, freqs_cis, mask, past_key_values, block_idx, current_step
    ):
        block_idx = block_idx.detach().clone()
        x = self.transformer.adapter(torch.cat([x, input_embeds], -1))
        for block in self.transformer.core_block:
            block_idx += 1
            x = torch.tanh(block(x))
            if past_key_values is not None:
                assert int(block_idx) not in past_key_values
                past_key_values[int(block_idx)] = x.detach()
        return x, block_idx

    def _maybe_checkpoint_core_block(self, *args):
        if self.gradient_checkpointing:
            return checkpoint(self.core_block_forward, *args, use_reentrant=False)
        return self.core_block_forward(*args)

    def randomized_iteration_sampler(self):
        if not self.training:
            return torch.as_tensor(self.config.mean_recurrence), torch.as_tensor(0)
        n = torch.poisson(torch.tensor([4.0])).long()
        return n, torch.as_tensor(self.config.mean_backprop_depth)

    def initialize_state(self, input_embeds, scale=1.0):
        return torch.randn_like(input_embeds) * scale
