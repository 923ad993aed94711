"""What has another name in another version of Transformers."""

from __future__ import annotations

import inspect

from transformers.masking_utils import create_causal_mask

__all__ = ["CACHE"]

# What Transformers calls the cache, in arguments and in outputs; 5.24 renamed it.
CACHE = (
    "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
)
