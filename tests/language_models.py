"""Small language models and tokens for the tests of the transformer."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from deq_phantom_plugin.adapters.transformer import DEQTransformerConfig, DEQTransformerForCausalLM

TIGHT = {"f_solver": "broyden", "f_max_iter": 80, "f_tol": 1e-13}
VOCAB = 23


def make(tight=True, **settings):
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
    }
    config = DEQTransformerConfig(**{**sizes, **(TIGHT if tight else {}), **settings})
    model = DEQTransformerForCausalLM(config)
    return model.double() if tight else model


def tokens(batch=2, length=6):
    return torch.randint(1, VOCAB, (batch, length))


def padded(ids, n, side="left"):
    """Return a batch whose first row has `n` tokens of padding, and its mask."""
    ids, mask = ids.clone(), torch.ones_like(ids)
    where = slice(None, n) if side == "left" else slice(len(ids[0]) - n, None)
    ids[0, where], mask[0, where] = 0, 0
    return ids, mask


def gradients(model, ids):
    """The gradient of the cross-entropy, in the model's precision: Transformers' is in float32."""
    model.zero_grad()
    logits = model(ids).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def loss_gradients(model, ids, **kwargs):
    model.zero_grad()
    model(ids, labels=ids, **kwargs).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def solved(model, ids, **kwargs):
    """Return F and its equilibrium, as the model's own solve had them."""
    found = []
    handle = model.model.deq.register_forward_hook(
        lambda _, args, out: found.append((args[0], out[0][-1].detach()))
    )
    with torch.set_grad_enabled(model.training):
        model(ids, **kwargs)
    handle.remove()
    return found[0]
