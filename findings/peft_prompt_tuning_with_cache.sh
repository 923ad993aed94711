#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.24.0 (PyPI), torch 2.13.0: a prompt-tuned Llama generates other tokens
# with the cache, which is the default, than without; no warning.
#
# Expected: the same tokens greedily, with the cache, without it, and by a loop over the whole sequence.
# Seen, of six tokens after eight (virtual tokens far from zero, so that they matter):
#
#   with the cache      0  7 15 15 15 15
#   use_cache=False     0  8  5  0  7 23
#   the loop by hand    0  8  5  0  7 23
#
# Exit status 0 if the first still differs from the others, which agree.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.24.0 peft==0.21.2 accelerate==1.15.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = {"vocab_size": 29, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
base = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, initializer_range=0.5))
config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
model = peft.get_peft_model(base, config).eval()
with torch.no_grad():
    for p in model.prompt_encoder.parameters():
        p.normal_(std=2.0)
ids = torch.randint(1, 29, (1, 8))
settings = {
    "attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0
}
cached = model.generate(input_ids=ids, **settings)[0, 8:].tolist()
plain = model.generate(input_ids=ids, use_cache=False, **settings)[0, 8:].tolist()
by_hand = ids
with torch.no_grad():
    for _ in range(6):
        ones = torch.ones_like(by_hand)
        logits = model(input_ids=by_hand, attention_mask=ones, use_cache=False).logits
        by_hand = torch.cat([by_hand, logits[:, -1:].argmax(-1)], dim=1)
by_hand = by_hand[0, 8:].tolist()
print("cache", cached, "no cache", plain, "by hand", by_hand)
sys.exit(0 if cached != plain == by_hand else "the behaviour has changed")
PYTHON
