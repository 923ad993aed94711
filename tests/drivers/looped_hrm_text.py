"""HRM-Text: its four models that loop, tiny, in `looped.py`.

Its attention is FlashAttention 3 on a GPU. Here it is in plain PyTorch.
"""

import os
import sys
import tempfile
import types
from types import SimpleNamespace
from typing import ClassVar

import torch
from looped import built, error, original, trained
from torch.nn import functional as F

import deq_phantom_plugin as dpp

SETTINGS = {
    "max_seq_len": 8,
    "n_layers": 1,
    "hidden_size": 8,
    "num_heads": 2,
    "expansion": 1,
    "init_type": "lecun_normal",
    "norm_type": "pre",
    "norm_eps": 1e-6,
    "pos_emb_type": "rope",
    "rope_theta": 100.0,
    "vocab_size": 7,
    "half_layers": False,
}
TOKENS = torch.tensor([1, 2, 6, 0, 4, 3])
PACKED = {  # two texts, each a prefix that sees all of itself, and what goes on from it
    "prefix_lens": torch.tensor([2, 1]),
    "causal_lens": torch.tensor([2, 1]),
    "cu_seqlens": torch.tensor([0, 4, 6]),
    "position_ids": torch.tensor([0, 1, 2, 3, 0, 1]),
}


def prefix_attention(q, k, v, is_causal, prefix_lens, causal_lens, cu_seqlens, **scalars):
    """Attention in packed texts: a token sees those before it, and in a prefix all of that."""
    place = torch.arange(len(q))
    text = torch.bucketize(place, cu_seqlens, right=True) - 1
    inside = place - cu_seqlens[text]
    prefix = inside < prefix_lens[text]
    sees = (place[None] <= place[:, None]) | (prefix[None] & prefix[:, None] & (not is_causal))
    sees &= text[None] == text[:, None]
    heads = (a.transpose(0, 1) for a in (q, k, v))
    return F.scaled_dot_product_attention(*heads, attn_mask=sees).transpose(0, 1)


def cached_attention(q, k, v, k_cache, v_cache, cache_seqlens, num_splits, causal):
    """Attention over what a cache holds, which the new keys and values are written into."""
    begin = int(cache_seqlens)
    end = begin + q.shape[1]
    k_cache[:, begin:end], v_cache[:, begin:end] = k, v
    heads = (a.transpose(1, 2) for a in (q, k_cache[:, :end], v_cache[:, :end]))
    return F.scaled_dot_product_attention(*heads).transpose(1, 2)


class HrmText:
    """What all four have in common."""

    seam, inner = "loop", "model"
    plain: ClassVar = {}  # settings of checks that are of one case
    own_names: ClassVar = {}

    def prepare(self):
        attention = "models.flash_attention_prefixlm_v2"
        sys.modules[attention] = types.ModuleType(attention)
        sys.modules[attention].flash_attn_varlen_prefixlm = prefix_attention
        sys.modules["flash_attn_interface"] = types.ModuleType("flash_attn_interface")
        sys.modules["flash_attn_interface"].flash_attn_with_kvcache = cached_attention

    def built(self, module, grad="unset", arch=None, **settings):
        from models.lm_head import LMHead

        if grad != "unset":
            settings["grad"] = grad
        settings = {**(arch or {}), **SETTINGS, **self.settings, **settings}
        made = LMHead(getattr(module, self.name)(settings), settings)
        made.model.zL_init.data = torch.linspace(-1, 1, 8, dtype=torch.bfloat16)
        return made

    def loss(self, made, **extra):
        _, logits = made(None, {"inputs": TOKENS, **PACKED}, **extra)
        return F.cross_entropy(logits, TOKENS.roll(1))

    def watched(self, made):
        seen = {}
        made.embed_tokens.register_forward_hook(lambda module, args, output: seen.update(x=output))
        return seen

    def ends(self, func, start, moves_on):
        for _ in range(self.steps - moves_on):
            start = func(start)
        return start, func(start) if moves_on else start

    def special(self, root, module):
        """Caches and checkpoints are as they were."""
        theirs = built(original(root, self), self, "float32")
        ours = built(module, self, "float32", grad="npg")
        found = {"keys": list(ours.state_dict()) == list(theirs.state_dict())}
        found["cached"] = all(map(torch.equal, *map(self.generated, (ours, theirs))))
        found["resumed"] = resumed(theirs, ours)
        return found

    def compiled(self, root, module):
        """Return the errors of training in one compiled graph, of the original too."""
        graphs = {}
        for name, of, grad in [
            ("original", original(root, self), "unset"),
            *((str(spec), module, spec) for spec in (None, "tbptt(k=2)", "tbptt('all')", "upg")),
        ]:
            torch._dynamo.reset()
            made = built(of, self, "float32", grad=grad)
            want = trained(self, made)
            made.forward = torch.compile(made.forward, backend="aot_eager", fullgraph=True)
            graphs[name] = error(trained(self, made)[1], want[1])
        return graphs

    def configured(self, root, module):
        """Return the gradients that its configuration names, and the command line."""
        import hydra
        from omegaconf import OmegaConf

        named = []
        for override in ([], ["arch.grad=jfb"], ["arch.grad=null"], ['arch.grad="tbptt(k=2)"']):
            with hydra.initialize_config_dir(os.path.abspath("config"), version_base=None):
                overrides = [f"arch/net@arch={self.net}", *override]
                config = hydra.compose("cfg_pretrain", overrides)
            settings = OmegaConf.to_container(config.arch)
            loop = built(module, self, arch=settings).model.loop
            named.append("own" if loop.is_own else repr(loop.grad))
        return named

    def generated(self, made):
        """Return logits of a text, token after token with a cache; its first two at once."""
        made.eval()
        cache = made.create_cache(max_batch_size=1, max_seq_len=8)
        said = []
        with torch.inference_mode():
            for begin, end in ((0, 2), (2, 3), (3, 4)):
                batch = {
                    "inputs": TOKENS[None, begin:end],
                    "position_ids": torch.arange(begin, end),
                }
                batch |= {"cache": cache, "cache_lengths": begin}
                said.append(made(None, batch)[1])
        made.train()
        return said


class HRM(HrmText):
    net = "hrm"
    module = "models.baselines.hrm_nocarry_bp_warmup"
    name = "HierarchicalReasoningModel"
    settings: ClassVar = {"H_cycles": 2, "L_cycles": 3}
    steps = 6
    variants: ClassVar = {
        "bp_steps": ({}, [{"bp_steps": n} for n in (2, 3, 4, 5, 8)]),
        "default": ({}, [{}]),
    }
    unrolled: ClassVar = {"tbptt(k=1)": 1, "tbptt(k=3)": 3, "tbptt(k='all')": 6, "bptt": 6}

    def whole(self, root, k):
        made = built(original(root, self), self)
        made.model.L_level.register_forward_hook(detached(6 - k))
        made.model.H_level.register_forward_hook(detached((6 - k) // 3))
        return trained(self, made, bp_steps=8)  # all of it

    def map_of(self, made, seen):
        """The pair that carries the graph."""
        _levels = made.model

        def func(state):
            z_L = _levels.L_level(state[1], state[0], **PACKED)
            return _levels.H_level(state[0], z_L, **PACKED), z_L

        return func

    def ends(self, func, start, moves_on):
        z_H, z_L = start
        for number in range(6 - moves_on):
            moved = func((z_H, z_L))
            z_H, z_L = (moved[0] if number % 3 == 2 else z_H), moved[1]
        return (z_H, z_L), func((z_H, z_L)) if moves_on else (z_H, z_L)

    def special(self, root, module):
        """The number of `bp_warmup_ratio` beside that of a ramp, over a training of 200 steps."""
        settings = {"bp_warmup_ratio": 0.2, "bp_max_steps": 5}
        made = built(module, self, grad="ramp('tbptt', {'k': (2, 5)}, until=0.2)", **settings)
        rows = []
        for step in range(1, 201):  # they count from 1
            dpp.set_step(made, step - 1, total=200)
            state = SimpleNamespace(step=step, total_steps=200)
            theirs = made.compute_train_extra_args(state)["bp_steps"]
            loop = made.model.loop
            ours = loop.grad.resolve(loop.context(torch.zeros(1))).k
            rows.append([theirs, ours])
        return {**super().special(root, module), "ramp": rows}


class TRM(HrmText):
    net = "trm"
    module, name = "models.baselines.trm_nocarry", "TinyRecursiveModel"
    settings: ClassVar = {"H_cycles": 3, "L_cycles": 2, "H_bp_steps": 1, "L_bp_steps": 2}
    steps = 3
    variants: ClassVar = {
        f"{high} and {low}": ({"H_bp_steps": high, "L_bp_steps": low}, [{}] * 2)
        for high, low in ((1, 1), (1, 2), (2, 3), (3, 1), (1, 5), (3, 6))
    }
    unrolled: ClassVar = {"tbptt(k=1)": 1, "tbptt(k=2)": 2, "tbptt(k='all')": 3, "bptt": 3}

    def whole(self, root, k):
        made = built(original(root, self), self, H_bp_steps=3, L_bp_steps=6)
        made.model.L_level.register_forward_hook(detached(3 * (3 - k)))
        return trained(self, made)

    def map_of(self, made, seen):
        level = made.model.L_level

        def func(state):
            z_H, z_L = state
            z_L = level(level(z_L, z_H, **PACKED), z_H, **PACKED)
            return level(z_H, z_L, **PACKED), z_L

        return func


class Universal(HrmText):
    net = "ut"
    module, name = "models.baselines.ut_nocarry", "UniversalTransformer"
    settings: ClassVar = {"cycles": 4, "bp_cycles": 2}
    steps, carrying = 4, "bp_cycles"
    unrolled: ClassVar = {"tbptt(k=1)": 1, "tbptt(k=2)": 2, "tbptt(k='all')": 4, "bptt": 4}

    @property
    def variants(self):
        return {f"{k} of 4": ({self.carrying: k}, [{}] * 2) for k in (0, 1, 2, 4, 5)}

    def whole(self, root, k):
        return trained(self, built(original(root, self), self, **{self.carrying: k}))

    def map_of(self, made, seen):
        return lambda z: made.model.L_level(z, seen["x"], **PACKED)


class Rins(Universal):
    net = "rins"
    module, name = "models.baselines.rins_nocarry", "RINS"
    settings: ClassVar = {"L_cycles": 4, "L_bp_cycles": 2}
    carrying = "L_bp_cycles"


def detached(number):
    """Return a hook that detaches the first results of a module."""
    calls = []

    def hook(module, args, output):
        calls.append(1)
        return output.detach() if len(calls) <= number else output

    return hook


def resumed(theirs, ours):
    """Whether the patched model loads a checkpoint from before the patch as `pretrain.py` does."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    folder = tempfile.mkdtemp()
    for made, act in ((theirs, checkpoint.save), (ours, checkpoint.load)):
        optimizer = torch.optim.Adam(made.parameters())
        state = {"model": made.state_dict(), "optim": get_optimizer_state_dict(made, optimizer)}
        act(state, checkpoint_id=folder, no_dist=True)
    return all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
