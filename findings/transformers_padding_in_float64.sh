#!/usr/bin/env bash
# transformers 5.24.0 (PyPI), torch 2.13.0: a Llama in float64 with attn_implementation="eager" gives
# NaN for a whole batch with left padding; in float32, or with sdpa, it does not.
#
# The mask is filled with the lowest number of the model's dtype, and the softmax is taken in float32,
# where that of float64 is minus infinity: a padded query that sees no key has no softmax. From the
# second layer on its NaN is in the values of all queries, since 0 times NaN is NaN. Expected: numbers.
# Seen (finite logits of the tokens, finite gradients):
#
#   eager float32 True True     eager float64 False False
#   sdpa  float32 True True     sdpa  float64 True  True
#
# Whoever checks gradients in float64 meets this. Exit status 0 if that is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.24.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"vocab_size": 13, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
found = {}
for implementation in ("eager", "sdpa"):
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        config = LlamaConfig(
            **sizes, num_key_value_heads=1, num_hidden_layers=2, attn_implementation=implementation
        )
        model = LlamaForCausalLM(config).to(dtype).train()
        ids = torch.randint(1, 13, (2, 7))
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        logits = model(ids, attention_mask=mask).logits[mask > 0]
        logits.sum().backward()
        finite = bool(logits.isfinite().all()), all(
            bool(p.grad.isfinite().all()) for p in model.parameters()
        )
        found[implementation, dtype] = finite
        print(implementation, dtype, *finite)
expected = {key: (key != ("eager", torch.float64),) * 2 for key in found}
sys.exit(0 if found == expected else "the behaviour has changed")
PYTHON
