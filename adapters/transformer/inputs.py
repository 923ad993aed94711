"""Reads the arguments that tell a causal model about its tokens.

`read_tokens` turns masks, positions and document boundaries into a `Tokens`, and refuses what could
be read in two ways. `visible` then makes the mask that the attention implementation wants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from deq_phantom_plugin._plumbing.compilation import never_compiled

from .versions import CACHE

__all__ = [
    "OF_DOCUMENTS",
    "Tokens",
    "check_arguments",
    "check_length",
    "longest_sequence",
    "read_tokens",
    "visible",
]

# The arguments, besides positions, that say where documents begin.
OF_DOCUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
# The arguments that have an effect, for messages.
_TAKEN = (
    "input_ids, attention_mask, position_ids, cache, inputs_embeds, labels, use_cache, "
    "logits_to_keep, num_items_in_batch, output_hidden_states, output_attentions, shift_labels, "
    f"{', '.join(OF_DOCUMENTS)}"
)
# Arguments of Transformers' causal models that are accepted and have no effect here.
_WITHOUT_EFFECT = {
    "cache_position",
    "max_length_k",
    "max_length_q",
    "num_items_in_batch",
    "return_dict",
}


def check_arguments(arguments: dict[str, Any]) -> None:
    """Refuse arguments from which a caller would expect an effect that they do not have.

    Args:
        arguments: the keyword arguments that `forward` does not name.

    Raises:
        ValueError: if Transformers knows the argument, and its value has no effect here.
        TypeError: if the argument is unknown.
    """
    for name, value in arguments.items():
        if value is None or name in _WITHOUT_EFFECT:
            continue
        if name == "is_causal" and value is False:
            raise ValueError("is_causal=False; expected True: tokens do not attend to later ones")
        if name == "output_router_logits" and value:
            raise ValueError("output_router_logits=True; expected False: there is no router")
        if name == "token_type_ids" and bool(torch.as_tensor(value).any()):
            raise ValueError("token_type_ids that are not all 0; expected 0: tokens have no types")
        if name in ("is_causal", "output_router_logits", "token_type_ids"):
            continue
        if name == "num_logits_to_keep":
            raise TypeError("num_logits_to_keep has another name now: logits_to_keep")
        raise TypeError(f"unexpected argument {name!r}; expected {_TAKEN}")


def longest_sequence(config: PreTrainedConfig) -> int:
    """Return the largest number of tokens of a sequence.

    Scaled positions multiply it by their factor (Transformers' `rope_parameters`).
    """
    limit: int = config.max_position_embeddings
    rope = config.rope_parameters or {}
    if rope.get("rope_type", rope.get("type", "default")) == "default":
        return limit
    original = rope.get("original_max_position_embeddings") or limit
    return max(limit, int(original * (rope.get("factor") or 1)))


@dataclass(frozen=True, eq=False)
class Tokens:
    """What is known about the tokens of a call: B rows of L tokens, with P tokens in the cache.

    Attributes:
        positions: the position of each token, shape (1 or B, L).
        mask: the keys to which a query may attend: None for all of them, bool of shape (B, P + L),
            or a prepared mask of shape (1 or B, 1 or heads, L, P + L).
        real: True for tokens and False for padding, shape (B, L); None without padding.
        documents: the number of the document of each token within its row, shape (B, L). Number 0
            is the document of the tokens in the cache. None if each row is one document.
    """

    positions: Tensor
    mask: Tensor | None
    real: Tensor | None
    documents: Tensor | None


@never_compiled  # the values of masks and positions decide what is done
def read_tokens(
    shape: tuple[int, int],
    device: torch.device,
    before: int,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Any = None,
    cu_seq_lens_k: Any = None,
    seq_idx: Tensor | None = None,
) -> Tokens:
    """Return what the arguments of a `forward` say about its tokens.

    A document begins where the positions are 0, or where they do not grow.

    Args:
        shape: (B, L).
        device: the device of the tokens.
        before: P, the number of tokens in the cache.
        attention_mask: see `DEQTransformerModel.forward`.
        position_ids: see `DEQTransformerModel.forward`.
        cu_seq_lens_q: see `DEQTransformerModel.forward`.
        cu_seq_lens_k: see `DEQTransformerModel.forward`.
        seq_idx: see `DEQTransformerModel.forward`.

    Raises:
        ValueError: if an argument is invalid; the message names its value and what is accepted.
    """
    mask = _checked_mask(attention_mask, shape, before)
    told = mask[:, before:] if mask is not None and mask.dim() == 2 else None
    starts = _starts(
        position_ids, told, seq_idx, cu_seq_lens_q, cu_seq_lens_k, shape, before, device
    )
    count = torch.arange(shape[1], device=device)
    if position_ids is not None:
        positions = position_ids.to(device)
    elif starts is not None:
        positions = count - count.where(starts, 0).cummax(-1).values
    else:
        positions = before + count[None]
    if mask is None:
        return Tokens(positions, None, None, _several(starts, None, None, before, shape))
    if mask.dim() == 4:
        # A query that may attend to nothing is padding. The mask already keeps documents apart.
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
        return Tokens(positions, mask, _unless_all(seen.any(-1).any(1).expand(shape)), None)
    real, past = mask[:, before:], mask[:, :before].any(-1)
    return Tokens(positions, mask, _unless_all(real), _several(starts, real, past, before, shape))


@never_compiled
def check_length(tokens: Tokens, shape: tuple[int, int], before: int, limit: int) -> None:
    """Refuse sequences that are too long, and inputs without tokens.

    Args:
        tokens: what is known about the tokens.
        shape: (B, L).
        before: P, the number of tokens in the cache.
        limit: the largest number of tokens of a document, see `longest_sequence`.

    Raises:
        ValueError: if there is no token, or a document has too many.
    """
    batch, length = shape
    if batch < 1 or length < 1:
        raise ValueError(
            f"input of shape {shape}; expected at least one sequence of at least one token"
        )
    longest = before + length
    if tokens.documents is not None and longest > limit:
        count = torch.arange(length, device=tokens.documents.device).expand(shape)
        new = torch.diff(tokens.documents, prepend=tokens.documents.new_zeros(batch, 1)) > 0
        begin = count.where(new, -before).cummax(-1).values
        longest = int((count - begin).max()) + 1
    if longest > limit:
        raise ValueError(
            f"a sequence of {longest} tokens; expected at most {limit}, "
            "config.max_position_embeddings times the factor of config.rope_parameters"
        )


@never_compiled
def visible(
    config: PreTrainedConfig, embeddings: Tensor, tokens: Tokens, cache: Any, before: int
) -> Any:
    """Return the mask that the attention implementation of a config wants.

    A padded query that could attend to nothing attends to its own token. Some attention kernels
    would give NaN for it otherwise, and 0 times NaN is NaN in a backward pass.

    Args:
        config: the config, which names the attention implementation.
        embeddings: shape (B, L, hidden_size).
        tokens: what is known about the tokens.
        cache: the cache, or None.
        before: P, the number of tokens in the cache.

    Raises:
        ValueError: if the implementation does not accept such a mask.
    """
    implementation = config._attn_implementation
    documents, mask = tokens.documents, tokens.mask
    known = implementation == "eager" or implementation in ALL_ATTENTION_FUNCTIONS
    if not known or implementation.startswith(("flash", "flex", "paged")):
        raise ValueError(
            f"attn_implementation={implementation!r}; expected sdpa, eager, or an implementation "
            "of your own that is registered with its mask"
        )
    if mask is not None and mask.dim() == 4:
        if mask.dtype != torch.bool:
            mask = mask.to(embeddings.dtype)
        elif implementation == "eager":  # eager attention adds the mask to the scores
            least = torch.finfo(embeddings.dtype).min
            mask = embeddings.new_zeros(()).where(mask, least)
        return _see_themselves(mask, before)
    same = None
    if documents is not None:
        row = torch.nn.functional.pad(documents, (before, 0))

        def same(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return row[batch, query] == row[batch, key]

    made = create_causal_mask(
        config=config,
        inputs_embeds=embeddings,
        attention_mask=mask,
        and_mask_function=same,
        **{CACHE: cache},
    )
    hidden = documents is not None or (mask is not None and not bool(mask.all()))
    if made is None and hidden and before + embeddings.shape[1] > 1:
        raise ValueError(
            f"attn_implementation={implementation!r} has no mask, so tokens would attend to "
            "padding or to other documents; register a mask with AttentionMaskInterface"
        )
    # A query can be without keys only if there is padding.
    return made if tokens.real is None else _see_themselves(made, before)


def _see_themselves(mask: Any, before: int) -> Any:
    """Let queries that may attend to no key attend to their own token."""
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return mask
    boolean = mask.dtype == torch.bool
    seen = mask if boolean else mask > torch.finfo(mask.dtype).min
    count = torch.arange(mask.shape[-2], device=mask.device)
    own = torch.arange(mask.shape[-1], device=mask.device) == before + count[:, None]
    alone = own & ~seen.any(-1, keepdim=True)
    return mask | alone if boolean else mask.masked_fill(alone, 0)


def _checked_mask(mask: Any, shape: tuple[int, int], before: int) -> Tensor | None:
    """Return a mask of 2 or 4 dimensions, and refuse what could be read in two ways."""
    if isinstance(mask, dict):
        if set(mask) != {"full_attention"}:
            raise ValueError(
                f"an attention_mask of {', '.join(map(str, mask))}; expected full_attention alone"
            )
        mask = mask["full_attention"]
    if mask is None:
        return None
    batch, length = shape
    keys = before + length
    if not isinstance(mask, Tensor):
        raise ValueError(f"an attention_mask of type {type(mask).__name__}; expected a tensor")
    found = tuple(mask.shape)
    if len(found) == 4:
        if found[0] not in (1, batch) or found[2:] != (length, keys):
            raise ValueError(
                f"a prepared attention_mask of shape {found}; expected (batch, heads or 1, "
                f"queries, keys) = ({batch}, 1, {length}, {keys})"
            )
        if mask.dtype == torch.bool:
            return mask
        if not mask.is_floating_point():
            raise ValueError(
                f"a prepared attention_mask of {mask.dtype}; expected bool, True where a token may "
                "be seen, or floating numbers that are added to the scores"
            )
        if bool(((mask == 0) | (mask == 1)).all()) and bool(mask.any()):
            raise ValueError(
                "a prepared attention_mask of zeros and ones in floating numbers, which are added "
                "to the scores; expected bool, or a very negative number where nothing may be seen"
            )
        return mask
    if found != (batch, keys):
        raise ValueError(
            f"an attention_mask of shape {found}; expected ({batch}, {keys}), the tokens of the "
            "cache included, or one prepared of 4 dimensions"
        )
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            "an attention_mask of 2 dimensions with other values than 0 and 1; expected 1 for "
            "tokens and 0 for padding; position_ids tell documents apart"
        )
    return mask.bool()


def _starts(
    position_ids: Tensor | None,
    real: Tensor | None,
    seq_idx: Tensor | None,
    cu_seq_lens_q: Any,
    cu_seq_lens_k: Any,
    shape: tuple[int, int],
    before: int,
    device: torch.device,
) -> Tensor | None:
    """Return where documents begin, bool of shape (B, L); None if no argument says so."""
    batch, length = shape
    starts = None
    if position_ids is not None and length:
        _check_rows("position_ids", position_ids, shape)
        positions = position_ids.to(device).expand(shape)
        if not positions.is_floating_point():
            positions = positions.long()  # signed, since -1 stands before the first position
        # A token after padding belongs to the same document if its position is above that of the
        # last token, or above that of the padding beside it (generation numbers padding, too). The
        # first token continues what is in the cache, unless its position is 0.
        count = torch.arange(length, device=device).expand(shape)
        last = count if real is None else count.where(real.to(device), -1).cummax(-1).values
        last = torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)
        previous = positions.gather(1, last.clamp_min(0)).where(last >= 0, -1)
        beside = torch.nn.functional.pad(positions[:, :-1], (1, 0), value=-1)
        starts = (positions <= torch.minimum(previous, beside)) | (positions == 0)
        if real is not None:
            starts = starts & real.to(device)
    given = {"seq_idx": seq_idx, "cu_seq_lens_q": cu_seq_lens_q, "cu_seq_lens_k": cu_seq_lens_k}
    given = {name: value for name, value in given.items() if value is not None}
    if given and before:
        raise ValueError(f"{', '.join(given)} with a cache; expected position_ids in their place")
    for name, value in given.items():
        if name == "seq_idx":
            _check_rows(name, value, shape)
            rows = value.to(device).expand(shape)
            found = torch.diff(rows, prepend=rows[:, :1]) != 0
        else:
            ends = torch.as_tensor(value, device=device).flatten().long()
            right = ends.numel() > 1 and bool((torch.diff(ends) >= 0).all())
            if batch != 1 or not right or (int(ends[0]), int(ends[-1])) != (0, length):
                raise ValueError(
                    f"{name} with tokens of shape {shape}; expected one row, and ends of documents "
                    f"that rise from 0 to {length}"
                )
            found = torch.zeros(shape, dtype=torch.bool, device=device)
            found[0, ends[:-1][ends[:-1] < length]] = True
        starts = found if starts is None else starts | found
    return starts


def _check_rows(name: str, value: Any, shape: tuple[int, int]) -> None:
    if not isinstance(value, Tensor) or tuple(value.shape) not in (shape, (1, shape[1])):
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} of shape {found}; expected {shape}")


def _several(
    starts: Tensor | None,
    real: Tensor | None,
    past: Tensor | None,
    before: int,
    shape: tuple[int, int],
) -> Tensor | None:
    """Return the documents of tokens; None if each row is one document, that of its cache."""
    if starts is None or 0 in shape:
        return None
    documents = starts.cumsum(-1)
    if not before:  # without a cache, the first token begins document 0
        documents = documents - documents[:, :1]
    low = documents if real is None else documents.masked_fill(~real, starts.shape[1] + 1)
    high = documents if real is None else documents.masked_fill(~real, -1)
    low, high = low.amin(-1), high.amax(-1)
    cut = high > low
    if before:
        others = low > 0
        cut = cut | (others if past is None else others & past)
    return documents if bool(cut.any()) else None


def _unless_all(real: Tensor) -> Tensor | None:
    """Return a mask, or None if all of it is True."""
    return None if bool(real.all()) else real
