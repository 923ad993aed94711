"""Prepares the attention mask for a decoder layer, and finds the states that are not padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
    packed_sequence_mask_function,
)

from ..versions import CACHE
from .around import Past

__all__ = ["layer_mask"]


def layer_mask(
    config: PreTrainedConfig,
    window: int | None,
    x: Tensor,
    attention_mask: Any,
    position_ids: Tensor,
    past: Past | None,
) -> tuple[Any, Tensor | None]:
    """Return the mask for the layer, and where states are not those of padding.

    A query that may attend to no key gets all keys instead. A kernel may return NaN for a query
    without keys, and 0 times NaN is NaN in the backward pass. The state of such a query is set to
    zero in any case.

    Args:
        config: the config of the layer.
        window: the number of tokens to which a token attends; None for all tokens before it.
        x: the injection, shape (B, L, hidden_size).
        attention_mask: None, a mask of two dimensions, or a prepared mask of four.
        position_ids: shape (1 or B, L).
        past: the stand-in for the cache, or None.

    Returns:
        The mask; and True where a state is not padding, shape (B, L, 1), or None without padding.

    Raises:
        ValueError: if the mask does not fit.
    """
    batch, length = x.shape[:2]
    real: Tensor | None = None
    if attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.dim() == 2):
        if attention_mask is not None:
            attention_mask, real = _tokens(attention_mask, x, past)
        mask = _causal_mask(config, window, x, attention_mask, position_ids, past)
    else:
        mask = attention_mask
        _check_prepared(mask, config, batch, length, past)
        if isinstance(mask, Tensor) and mask.is_floating_point():
            mask = _added(mask, x.dtype)
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return mask, real  # masks of FlashAttention and FlexAttention stay as they are
    if mask.dtype == torch.bool and config._attn_implementation == "eager":
        hidden = torch.finfo(x.dtype).min  # eager attention adds the mask to the scores
        mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, hidden)
    if mask.dtype == torch.bool:
        sees = mask.any(-1, keepdim=True)
        mask = mask | ~sees
    else:
        sees = (mask > torch.finfo(mask.dtype).min).any(-1, keepdim=True)
        mask = mask.masked_fill(~sees, 0)
    seeing = sees.any(1).expand(batch, -1, -1)
    return mask, seeing if real is None else seeing & real


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask that is added to the scores, converted to their dtype."""
    if bool(((mask == 0) | (mask == 1)).all()) and bool(mask.any()):
        raise ValueError(
            "an attention_mask of zeros and ones in floating numbers, which are added to the "
            "scores; expected bool, or a very negative number where nothing may be seen"
        )
    hidden = mask <= torch.finfo(mask.dtype).min
    return mask.to(dtype).masked_fill(hidden, torch.finfo(dtype).min)


def _tokens(mask: Tensor, x: Tensor, past: Past | None) -> tuple[Tensor | None, Tensor | None]:
    """Check a mask of two dimensions.

    Returns:
        The mask, and True where the new tokens are not padding, shape (B, L, 1). Both are None if
        the mask hides nothing.
    """
    batch, length = x.shape[:2]
    before = 0 if past is None else int(past.length)
    # A static cache may be given a mask of its whole length.
    fits = mask.shape[1] == before + length or (past is not None and past.is_static)
    if mask.shape[0] != batch or not fits:
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)}; expected ({batch}, {before + length}), "
            "one number per token, or a prepared one of four dimensions"
        )
    if bool(mask.all()):
        return None, None
    return mask, mask[:, before : before + length, None] > 0


def _check_prepared(
    mask: Any, config: PreTrainedConfig, batch: int, length: int, past: Past | None
) -> None:
    heads = config.num_attention_heads
    shape = tuple(mask.shape)
    fits = len(shape) == 4 and shape[0] in (1, batch) and shape[1] in (1, heads)
    fits = fits and (not isinstance(mask, Tensor) or shape[2] == length)
    fits = fits and (past is not None or not isinstance(mask, Tensor) or shape[3] == length)
    if not fits:
        raise ValueError(
            f"attention_mask of shape {shape}; expected two dimensions, (batch, length), or four: "
            f"(1 or {batch}, 1 or {heads}, {length}, keys)"
        )
    if isinstance(mask, Tensor) and not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(
            f"attention_mask of four dimensions and {mask.dtype}; expected bool, or numbers that "
            "are added to the scores"
        )


def _causal_mask(
    config: PreTrainedConfig,
    window: int | None,
    x: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor,
    past: Past | None,
) -> Any:
    """Return the mask that Transformers makes, and keep documents apart."""
    fresh = past is None or (not past.is_static and past.length == 0)
    make = create_causal_mask if window is None else create_sliding_window_causal_mask
    settings: dict[str, Any] = {}
    if fresh and attention_mask is not None:
        # Transformers looks at positions only where it has no mask.
        documents = _documents(position_ids, attention_mask)
        if documents is not None:
            if "flash" in (config._attn_implementation or ""):
                raise ValueError(
                    "attention_mask with padding and position_ids that restart, which "
                    "FlashAttention does not accept together; expected one of them"
                )
            settings["and_mask_function"] = packed_sequence_mask_function(documents)
    return make(
        config=config,
        inputs_embeds=x,
        attention_mask=attention_mask,
        position_ids=position_ids,
        **{CACHE: None if fresh or past is None else past.alone()},
        **settings,
    )


def _documents(position_ids: Tensor, attention_mask: Tensor) -> Tensor | None:
    """Return the number of each token's document, shape (B, L); None if each row has one document.

    A document begins where the position does not follow that of the last token. After padding, it
    may also follow the position of the padding, since generation numbers padding, too.
    """
    real = attention_mask > 0
    positions = position_ids.expand(real.shape)
    index = torch.arange(real.shape[1], device=real.device)
    last = index.where(real, -1).cummax(-1).values[:, :-1]
    before, here = positions.gather(1, last.clamp_min(0)), positions[:, 1:]
    after = (here <= before) & ((here <= positions[:, :-1]) | (here == 0))
    restarts = torch.where(last == index[:-1], here != before + 1, after)
    restarts = restarts & real[:, 1:] & (last >= 0)
    if not bool(restarts.any()):
        return None
    return torch.nn.functional.pad(restarts.long().cumsum(-1), (1, 0))
