"""A looped language model on Transformers' Llama layers: prelude, recurrent block, coda.

The model follows "Scaling up Test-Time Compute with Latent Reasoning" (Geiping et al. 2025), whose
model is called Huginn. The prelude turns tokens into an embedding e. The block
h <- layers(adapter([h, e])) is repeated, beginning at h = 0, so each evaluation gets the input
again. The coda turns the last state into logits. There are three differences to Huginn: the first
state is not noise, e is normalised, and h is normalised only with `block_norm`. With that
normalisation, the loop is a contraction at this size, and the number of its evaluations makes no
difference.

The loop is a `dpp.Equilibrium(steps=...)`. The config has its number of steps and its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

import deq_phantom_plugin as dpp


class LoopedConfig(LlamaConfig):
    """The config of a `LoopedForCausalLM`: Llama's config with the sizes of a small model.

    Attributes:
        prelude_layers: the number of layers before the loop.
        block_layers: the number of layers of the block that is repeated.
        coda_layers: the number of layers after the loop.
        block_norm: whether the block ends in a normalisation.
        steps: the number of evaluations of the block, or a distribution of this number, see
            `dpp.Equilibrium`.
        grad: the gradient of the loop, a spec of `dpp.get_strategy`.

    Raises:
        ValueError: if the heads do not fit the size, or `steps` or `grad` is invalid.
    """

    model_type = "looped_lm"

    vocab_size: int = 256
    hidden_size: int = 64
    intermediate_size: int = 128
    num_attention_heads: int = 4
    max_position_embeddings: int = 64
    initializer_range: float = 0.08  # about sqrt(2 / (5 * hidden_size)), as Huginn's
    use_cache: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    prelude_layers: int = 1
    block_layers: int = 1
    coda_layers: int = 1
    block_norm: bool = False
    steps: int | str = 8
    grad: str = "tbptt(k=4)"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.num_hidden_layers = self.prelude_layers + self.block_layers + self.coda_layers
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} with num_attention_heads="
                f"{self.num_attention_heads}; expected a multiple of twice the heads"
            )
        dpp.Equilibrium(steps=self.steps, grad=self.grad)  # raises an error if one is invalid


class LoopedForCausalLM(LlamaPreTrainedModel):
    """The language model; it takes whole sequences without padding.

    Args:
        config: the sizes, the loop and its gradient.
    """

    config: LoopedConfig
    config_class = LoopedConfig
    # The training step is in the `state_dict`, but it is not a weight. So `from_pretrained` must
    # not report it as missing or unexpected.
    _keys_to_ignore_on_load_unexpected = [r"equilibrium\.memory"]  # noqa: RUF012
    _keys_to_ignore_on_load_missing = [r"equilibrium\.memory"]  # noqa: RUF012

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        size = config.hidden_size
        numbers = iter(range(config.num_hidden_layers))

        def layers(count: int) -> nn.ModuleList:
            return nn.ModuleList(LlamaDecoderLayer(config, next(numbers)) for _ in range(count))

        def norm() -> LlamaRMSNorm:
            return LlamaRMSNorm(size, eps=config.rms_norm_eps)

        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.prelude, self.prelude_norm = layers(config.prelude_layers), norm()
        self.adapter = nn.Linear(2 * size, size, bias=False)
        self.block = layers(config.block_layers)
        self.block_norm = norm() if config.block_norm else nn.Identity()
        self.coda, self.coda_norm = layers(config.coda_layers), norm()
        self.lm_head = nn.Linear(size, config.vocab_size, bias=False)
        self.equilibrium = dpp.Equilibrium(steps=config.steps, grad=config.grad)
        self.post_init()

    def recurrence(self, input_ids: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """Return the map that is repeated, and the state at which the loop begins.

        Args:
            input_ids: tokens, shape (B, L).

        Returns:
            The block as a map of states of shape (B, L, hidden_size), and zeros of this shape.
        """
        state = self.embed_tokens(input_ids)
        positions = self._positions(state)
        for layer in self.prelude:
            state = layer(state, position_embeddings=positions)
        embedding = self.prelude_norm(state)

        def block(h: Tensor) -> Tensor:
            h = self.adapter(torch.cat([h, embedding], dim=-1))
            for layer in self.block:
                h = layer(h, position_embeddings=positions)
            normed: Tensor = self.block_norm(h)
            return normed

        return block, torch.zeros_like(embedding)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> CausalLMOutput:
        """Return logits, and the loss of the next token if there are labels.

        Args:
            input_ids: tokens, shape (B, L).
            labels: `input_ids` again, or None.
        """
        state = self.equilibrium(*self.recurrence(input_ids))
        positions = self._positions(state)
        for layer in self.coda:
            state = layer(state, position_embeddings=positions)
        logits = self.lm_head(self.coda_norm(state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits)

    def _positions(self, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.rotary_emb(state, torch.arange(state.shape[1], device=state.device)[None])


@contextmanager
def loops(model: LoopedForCausalLM, steps: int) -> Iterator[None]:
    """Change the number of evaluations of a model's block inside a `with` block."""
    before = model.equilibrium.steps
    model.equilibrium.steps = steps
    try:
        yield
    finally:
        model.equilibrium.steps = before


AutoConfig.register(LoopedConfig.model_type, LoopedConfig, exist_ok=True)
AutoModelForCausalLM.register(LoopedConfig, LoopedForCausalLM, exist_ok=True)
