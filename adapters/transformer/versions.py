"""Names that differ between versions of Transformers."""

from __future__ import annotations

import inspect

from transformers.masking_utils import create_causal_mask

__all__ = ["CACHE"]

# Transformers' name of the cache, in arguments and in outputs. Version 5.24 has changed it.
CACHE = (
    "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
)
