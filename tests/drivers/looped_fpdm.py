"""fixed-point-diffusion-models: a tiny diffusion transformer, in `looped.py`."""

import random
import sys
import tempfile
import types
from typing import ClassVar

import torch
from looped import built, original, trained
from torch import nn
from torch.nn import functional as F

N = 4


class PatchEmbed(nn.Module):
    """As much of timm's as the repository uses; timm itself needs torchvision."""

    def __init__(self, size, patch, channels, hidden, bias):
        super().__init__()
        self.patch_size, self.num_patches = (patch, patch), (size // patch) ** 2
        self.proj = nn.Conv2d(channels, hidden, patch, stride=patch, bias=bias)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, hidden, num_heads, qkv_bias):
        super().__init__()
        self.heads = num_heads
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden, qkv_bias), nn.Linear(hidden, hidden)

    def forward(self, x):
        split = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2))


class Mlp(nn.Sequential):
    def __init__(self, in_features, hidden_features, act_layer, drop):
        inside = nn.Linear(in_features, hidden_features)
        super().__init__(inside, act_layer(), nn.Linear(hidden_features, in_features))


class Controller:
    """Numbers of evaluations one after another, as adaptive sampling has them."""

    def __init__(self):
        self.numbers = iter([2, 1, 0, 3] * 100)

    def get(self):
        return next(self.numbers)


def fixed(without, carrying):
    """Settings without a choice."""
    names = ("no_grad_min", "no_grad_max", "with_grad_min", "with_grad_max")
    numbers = (without, without, carrying, carrying)
    return {f"fixed_point_{n}_iters": k for n, k in zip(names, numbers, strict=True)}


DRAWN = {**fixed(0, 1), "fixed_point_no_grad_max_iters": 3, "fixed_point_with_grad_max_iters": 3}


class Fpdm:
    module, seam, inner = "models", "loop", ""
    plain = fixed(2, 2)
    variants: ClassVar = {
        "drawn": (DRAWN, [{}] * 5),
        "all of it": (fixed(0, 3), [{}] * 2),
        "none of it": (fixed(3, 0), [{}] * 2),
        "reused": ({**DRAWN, "fixed_point_reuse_solution": True}, [{"one_time": True}] * 4),
        "adaptive": ({**fixed(1, 1), "adaptive": True}, [{}] * 2),
        "autocast": (DRAWN, [{"autocast": True}] * 4),
        "checkpointed": ({**DRAWN, "use_gradient_checkpointing": True}, [{}] * 2),
    }
    unrolled: ClassVar = {"tbptt(k=1)": 1, "tbptt(k=2)": 2, "tbptt(k='all')": "all", "bptt": "all"}
    own_names: ClassVar = {}

    def prepare(self):
        for name in ("timm", "timm.models", "timm.models.vision_transformer"):
            sys.modules[name] = types.ModuleType(name)
        last = sys.modules["timm.models.vision_transformer"]
        last.PatchEmbed, last.Attention, last.Mlp = PatchEmbed, Attention, Mlp

    def built(self, module, grad="unset", **settings):
        embed = module.TimestepEmbedder
        if not hasattr(embed, "in_float"):  # it computes in float32 whatever it is given
            embed.in_float = in_float = embed.timestep_embedding
            embed.timestep_embedding = staticmethod(
                lambda t, dim: in_float(t, dim).to(torch.get_default_dtype())
            )
        size = {
            "input_size": 4,
            "patch_size": 2,
            "hidden_size": 8,
            "num_heads": 2,
            "num_classes": 3,
        }
        settings = {"use_gradient_checkpointing": False, **settings}
        if settings.get("adaptive"):
            settings["iteration_controller"] = Controller()
        made = module.DiT(**size, fixed_point=True, learn_sigma=False, **settings)
        if grad != "unset" and hasattr(made, "loop"):
            made.loop.grad = grad
        return made

    def loss(self, made, one_time=False, autocast=False):
        drawn = torch.Generator().manual_seed(5)
        x = torch.randn(2, 4, 4, 4, generator=drawn)
        t = torch.tensor([7, 7 if one_time else 90])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return made(x, t, torch.tensor([0, 2])).float().square().mean()

    def whole(self, root, k):
        """Train the original with its last k evaluations in the graph."""
        if k == "all":  # and where the loop begins
            return trained(self, built(original(root, self, [".detach()"]), self, **self.plain))
        return trained(self, built(original(root, self), self, **fixed(N - k, k)))

    def watched(self, made):
        seen = {}
        for name in ("t_embedder", "y_embedder", "block_pre_projection"):
            made.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name: seen.update({name: output})
            )
        return seen

    def map_of(self, made, seen):
        injected, c = seen["block_pre_projection"], seen["t_embedder"] + seen["y_embedder"]

        def func(x):
            x = made.block_fixed_point_projection_fc1(torch.cat([x, injected], -1))
            x = made.block_fixed_point_projection_fc2(F.gelu(x, approximate="tanh"))
            return made.block_fixed_point(x, c)

        return func

    def ends(self, func, start, moves_on):
        for _ in range(N - moves_on):
            start = func(start)
        return start, func(start) if moves_on else start

    def special(self, root, module):
        """Return the parameters that have no gradient under DDP in some of three calls."""
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1
        )
        found = {}
        for spec in (None, "tbptt(k=1)", "tbptt('all')", "npg(k=3)", "jfb", "upg(k=2)", "ift"):
            for autocast in (False, True):
                made = built(module, self, "float32", grad=spec, **DRAWN)
                parallel = nn.parallel.DistributedDataParallel(made)
                random.seed(0)
                missing = set()
                for _ in range(3):
                    made.zero_grad()
                    self.loss(parallel, autocast=autocast).backward()
                    missing |= {
                        name
                        for name, p in made.named_parameters()
                        if p.grad is None or not p.grad.abs().sum() > 0
                    }
                found[f"{spec}, autocast={autocast}"] = sorted(missing)
        torch.distributed.destroy_process_group()
        return found
