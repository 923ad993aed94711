"""The weight-tied decoder block of a deep equilibrium Transformer, and what it sees in a solve."""

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
    """All that a block sees in a solve besides the state: F is a function of the state alone.

    Attributes:
        injection: added to queries, keys and values, shape (B, L, 3 * hidden_size).
        rotation: cos and sin of the positions, each of shape (1 or B, L, head size).
        attention_mask: as the attention implementation wants it.
        past: keys and values of the tokens before, each of shape (B, heads, P, head size).
        keep: dropout masks by the place they are for.
    """

    injection: Tensor
    rotation: tuple[Tensor, Tensor]
    attention_mask: Any
    past: tuple[Tensor, Tensor] | None
    keep: dict[str, Tensor]

    def drop(self, place: str, x: Tensor) -> Tensor:
        """Apply the mask of a place, the same at every evaluation of the solve."""
        return x * self.keep[place] if place in self.keep else x


class ScaledLinear(nn.Linear):
    """A linear layer of the equilibrium, with weights from N(0, gain^2 / in_features).

    A block of weights as small as Transformers' default of 0.02 does next to nothing, and leaves
    its equilibrium next to undetermined: rho(J) is 0.99 at the start. With these gains it is
    0.7 to 0.85 (hidden sizes 64 and 128), for both places of the normalisation.
    """

    def __init__(self, size: int, out: int, bias: bool = True, gain: float = 1.0) -> None:
        super().__init__(size, out, bias)
        self.gain = gain


class DEQTransformerBlock(nn.Module):
    """The weight-tied decoder block, which sees its injection in queries, keys and values.

    Normalisations have no weights, and with `pre_layer_norm` the feed-forward part adds to the
    normalised state: both as in the official code (github.com/locuslab/deq, DEQ-Sequence). A
    residual stream that is never normalised would have an equilibrium only where all parts add
    up to zero.
    """

    is_causal = True  # what Transformers' attention functions look for

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
        """Return the next state, shape (B, L, hidden_size), or what lies on the way to it.

        All ways to the weights lead through here: FSDP, which shards them, gathers them for it.

        Args:
            state: shape (B, L, hidden_size).
            around: what the block sees besides.
            of: "state"; "heads" for queries, keys and values; "attention" for what the heads found
                and how they attended.
        """
        if of == "heads":
            return self._heads(state, around)
        mixed, weights = self._attend(state, around)
        return (mixed, weights) if of == "attention" else self._next(state, mixed, around)

    def _next(self, state: Tensor, mixed: Tensor, around: Surroundings) -> Tensor:
        """Return the next state, from what the heads found."""
        pre = self.config.pre_layer_norm
        mixed = self.output(mixed.reshape(state.shape))
        x: Tensor = self.norm(around.drop("attention", mixed) + state)
        # On rows of tokens: behind a view a compiler does not see that what relu's backward needs
        # is what `down` keeps anyway, and keeps it twice, as slow booleans.
        inner = self.activation(self.up(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        x = x + around.drop("feed_forward", self.down(around.drop("inner", inner)))
        return x if pre else self.norm(x)

    def _attend(self, state: Tensor, around: Surroundings) -> tuple[Tensor, Tensor | None]:
        """Return what the heads found, shape (B, L, heads, head size), and how they attended.

        The latter has the shape (B, heads, L, P + L); None where the attention implementation
        does not tell.
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

        That of attention drops a position for all queries of a head: it can then be applied to the
        values, and works with every attention implementation.
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
    """Draw a mask that keeps the mean, of a dtype and on a device like those of `like`."""
    return like.new_empty(shape).bernoulli_(1 - p).div_(1 - p)
