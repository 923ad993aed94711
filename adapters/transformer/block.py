"""The weight-tied decoder block of a deep equilibrium Transformer.

`DEQTransformerBlock` maps the states of all tokens to the next states. `Surroundings` holds its
other inputs, which stay the same all through a solve, so that F is a function of the state alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .config import DEQTransformerConfig

__all__ = ["DEQTransformerBlock", "ScaledLinear", "Surroundings", "dropout_mask"]


@dataclass(frozen=True, eq=False)
class Surroundings:
    """The inputs of a block besides the state, which stay the same all through a solve.

    Attributes:
        injection: the term that is added to queries, keys and values, shape
            (B, L, 3 * hidden_size).
        rotation: cos and sin of the positions, each of shape (1 or B, L, head size).
        attention_mask: the mask in the format of the attention implementation.
        past: keys and values of the P tokens in the cache, each of shape (B, heads, P, head size);
            None without a cache.
        keep: the dropout mask of each place in the block.
    """

    injection: Tensor
    rotation: tuple[Tensor, Tensor]
    attention_mask: Any
    past: tuple[Tensor, Tensor] | None
    keep: dict[str, Tensor]

    def drop(self, place: str, x: Tensor) -> Tensor:
        """Apply the dropout mask of a place; every evaluation of a solve has the same mask."""
        return x * self.keep[place] if place in self.keep else x


class ScaledLinear(nn.Linear):
    """A linear layer of the equilibrium, with weights from N(0, gain^2 / in_features).

    With weights as small as Transformers' default of 0.02, the block hardly changes the state, and
    its equilibrium is hardly determined: rho(J) is 0.99 at the start of training. With these gains
    rho(J) is 0.7 to 0.85, for hidden sizes 64 and 128 and for both places of the normalisation.
    """

    def __init__(self, size: int, out: int, bias: bool = True, gain: float = 1.0) -> None:
        super().__init__(size, out, bias)
        self.gain = gain


class DEQTransformerBlock(nn.Module):
    """The weight-tied decoder block; its injection is added to queries, keys and values.

    As in the official code (github.com/locuslab/deq, DEQ-Sequence), normalisations have no weights,
    and with `pre_layer_norm` the feed-forward part adds to the normalised state. A residual stream
    without any normalisation would have an equilibrium only where all its parts add up to zero.

    Args:
        config: the sizes of the block.
    """

    is_causal = True  # Transformers' attention functions read this attribute

    def __init__(self, config: DEQTransformerConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.head_dim = size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.qkv = ScaledLinear(size, 3 * size, bias=False, gain=0.3)
        self.output = ScaledLinear(size, size)
        self.up = ScaledLinear(size, config.intermediate_size, gain=0.7)
        self.down = ScaledLinear(config.intermediate_size, size, gain=0.7)
        self.activation = ACT2FN[config.hidden_act]
        self.norm = nn.LayerNorm(size, config.layer_norm_eps, elementwise_affine=False)

    def forward(self, state: Tensor, around: Surroundings, of: str = "state") -> Any:
        """Return the next state, shape (B, L, hidden_size), or an intermediate result.

        Every use of the weights goes through this method, since FSDP, which shards them, gathers
        them for a forward pass only.

        Args:
            state: shape (B, L, hidden_size).
            around: the other inputs.
            of: "state" for the next state; "heads" for queries, keys and values; "attention" for
                the output of the heads and their attention weights.
        """
        if of == "heads":
            return self._heads(state, around)
        mixed, weights = self._attend(state, around)
        return (mixed, weights) if of == "attention" else self._next(state, mixed, around)

    def _next(self, state: Tensor, mixed: Tensor, around: Surroundings) -> Tensor:
        """Return the next state, computed from the output of the heads."""
        pre = self.config.pre_layer_norm
        mixed = self.output(mixed.reshape(state.shape))
        x: Tensor = self.norm(around.drop("attention", mixed) + state)
        # This works on rows of tokens. Behind a view, a compiler does not see that `down` keeps
        # what relu's backward pass needs. It would then keep that once more, as slow booleans.
        inner = self.activation(self.up(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        x = x + around.drop("feed_forward", self.down(around.drop("inner", inner)))
        return x if pre else self.norm(x)

    def _attend(self, state: Tensor, around: Surroundings) -> tuple[Tensor, Tensor | None]:
        """Return the output of the heads and their attention weights.

        The output has the shape (B, L, heads, head size), and the weights (B, heads, L, P + L). The
        weights are None if the attention implementation does not return them.
        """
        query, key, value = self._heads(state, around)
        if around.past is not None:
            key = torch.cat([around.past[0], key], dim=2)
            value = torch.cat([around.past[1], value], dim=2)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        mixed, weights = attend(
            self, query, key, value, around.attention_mask, dropout=0.0, scaling=self.scaling
        )
        return mixed, weights

    def _heads(self, state: Tensor, around: Surroundings) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each of shape (B, heads, L, head size)."""
        x = self.norm(state) if self.config.pre_layer_norm else state
        qkv = self.qkv(x) + around.injection
        query, key, value = qkv.unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        query, key = apply_rotary_pos_emb(query, key, *around.rotation)
        return query, key, around.drop("value", value)

    def keep(self, like: Tensor) -> dict[str, Tensor]:
        """Draw the dropout masks of one solve (Gal & Ghahramani 2016, arXiv:1512.05287).

        The dropout of attention drops a position for all queries of a head. So it can be applied to
        the values, and works with every attention implementation.

        Args:
            like: a tensor of shape (B, L, hidden_size) with the dtype and device of the masks.

        Returns:
            The masks by their place in the block; empty outside training.
        """
        config = self.config
        batch, length, size = like.shape
        heads = config.num_attention_heads
        places = {
            "attention": (config.dropout, (batch, 1, size)),
            "inner": (config.dropout, (batch, 1, config.intermediate_size)),
            "feed_forward": (config.dropout, (batch, 1, size)),
            "value": (config.attention_dropout, (batch, heads, length, 1)),
        }
        return {
            place: dropout_mask(like, shape, p)
            for place, (p, shape) in places.items()
            if self.training and p > 0
        }


def dropout_mask(like: Tensor, shape: tuple[int, ...], p: float) -> Tensor:
    """Draw a mask that keeps the mean, with the dtype and the device of `like`."""
    return like.new_empty(shape).bernoulli_(1 - p).div_(1 - p)
