"""Attractor: a tiny language model with a fixed point, in `looped.py`."""

import importlib
from typing import ClassVar

import torch
from looped import built, error, original, trained
from torch.nn import functional as F

SETTINGS = {
    "block_size": 4,
    "vocab_size": 7,
    "padding_multiple": 1,
    "n_embd": 8,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "n_backbone_layers": 1,
    "norm_class_name": "RMSNorm",
    "nonlin_name": "GELU",
    "tie_embeddings": False,
    "max_iter": 60,
    "tol": 1e-5,
    "solver": "fpi",
}


class Attractor:
    seam, inner = "equilibrium", ""
    plain: ClassVar = {}

    def __init__(self, module, name):
        self.module, self.name = module, name
        self.variants = {
            f"{kind}, clip={clip}": ({"backward_type": kind, "adjoint_grad_clip": clip}, [{}] * 2)
            for kind in ("onestep", "anderson", "picard")
            for clip in (None, 0.1)
        }
        self.variants["frozen"] = ({"frozen": True}, [{}])
        self.unrolled = {"tbptt(k=1)": 1, "upg(k=3, lam=1.0)": 3, "bptt(steps=5)": "bptt"}
        self.own_names = {
            "npg(k=2, lam=1.0)": (False, lambda transposed, v, _: v + transposed @ v),
            "npg(k=2, lam=1.0, clip=0.1)": (False, clipped),
        }

    def prepare(self):
        pass

    def built(self, module, grad="unset", frozen=False, **settings):
        package = importlib.import_module(self.module.rpartition(".")[0] + ".config")
        config = getattr(package, f"{self.name}Config")
        if grad != "unset":
            settings["grad"] = grad
        made = getattr(module, self.name)(config(**{**SETTINGS, **settings}))
        if frozen:
            made.transformer.core_block.requires_grad_(False)
        return made

    def loss(self, made):
        tokens = torch.tensor([[1, 2, 6, 0], [4, 4, 3, 5]])
        logits = made(tokens, return_logits=True)["logits"]
        return F.cross_entropy(logits.transpose(1, 2), tokens.roll(1, 1))

    def whole(self, root, k):
        """Train the original with k evaluations of its map in the graph."""
        made = built(original(root, self), self)

        def unrolled(y, c, *rest):
            steps = 5 if k == "bptt" else k
            y = c if k == "bptt" else y
            for _ in range(steps):
                y = made._f(y, c, *rest)
            return y

        made._attach_implicit_grad = unrolled
        return trained(self, made)

    def watched(self, made):
        seen = {}
        made.transformer.prelude[-1].register_forward_hook(
            lambda module, args, output: seen.update(c=output)
        )
        return seen

    def map_of(self, made, seen):
        c = seen["c"]

        def func(y):
            h = y + c
            for block in made.transformer.core_block:
                h = block(h, made.freqs_cis[:, : h.shape[1]])
            return h - y

        return func

    def ends(self, func, found, moves_on):
        return found, func(found) if moves_on else found

    def special(self, root, module):
        """Gradients of their own code, and of the name that a report gives it."""
        found = {}
        exact = {"backward_tol": 1e-11, "backward_max_iter": 300, "max_iter": 300, "tol": 1e-13}
        for name, (settings, _) in self.variants.items():
            theirs = built(original(root, self), self, **exact, **settings)
            ours = built(module, self, grad=None, **exact, **settings)
            named = repr(ours.equilibrium.grad)
            ours.equilibrium.grad = named
            assert not ours.equilibrium.is_own
            errors = error(trained(self, ours)[1], trained(self, theirs)[1])
            found[name] = [named, errors]
        return found


def clipped(transposed, v, end):
    """One product, of each sample no longer than a tenth of its v."""
    product, v = ((a.view(len(end), -1)) for a in (transposed @ v, v))
    longest = 0.1 * v.norm(dim=1, keepdim=True)
    assert (product.norm(dim=1, keepdim=True) > longest).any()
    return (v + product * (longest / product.norm(dim=1, keepdim=True)).clamp(max=1)).flatten()
