"""The language model sharded by FSDP2 as Accelerate does it, in two processes and in one.

torchrun --standalone --nproc-per-node 2 sharded_transformer.py OUT.json
"""

import copy

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from transformers import LlamaConfig, LlamaForCausalLM

import deq_phantom_plugin as dpp
from deq_phantom_plugin.adapters.transformer import (
    DEQTransformerConfig,
    DEQTransformerForCausalLM,
    deq_from_layer,
)
from in_processes import everywhere, together, write

VOCAB, STEPS = 17, 3
LENGTHS = (4, 13)  # of the two processes: their solves take differently many evaluations
SPECS = ("ift(tol=1e-12, max_iter=100)", "npg", "upg(k=3, checkpoint=True)")
TRAINED = [(spec, tied) for spec in SPECS for tied in (True, False)]


def make(grad="jfb", tied=True, **settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    settings = {"f_solver": "broyden", "f_max_iter": 80, "f_tol": 1e-13, **settings}
    config = DEQTransformerConfig(
        vocab_size=VOCAB,
        max_position_embeddings=32,
        grad=grad,
        tie_word_embeddings=tied,
        **sizes,
        **settings,
    )
    return DEQTransformerForCausalLM(config).double()


def converted():
    """A Llama with one layer as it is and one at its equilibrium."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_hidden_layers=2, **sizes))
    layer = deq_from_layer(
        model.model.layers[1], grad="npg", f_solver="broyden", f_max_iter=80, f_tol=1e-6
    )
    model.model.layers[1] = layer
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(50)  # of a small injection the equilibrium is far
    return model.double()


def tokens(rank, step):
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randint(VOCAB, (2, LENGTHS[rank]), generator=generator)


def loss_of(model, ids, predicted):
    """The part of the step's loss that these tokens are."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    return (
        torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum") / predicted
    )


def accelerator_of(**settings):
    """Accelerate has its FSDP for accelerators alone, and is told here that this is one."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
        **settings,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator


def sharded(model, **settings):
    """The model and its optimiser as Accelerate prepares them, and what it has sharded apart."""
    accelerator = accelerator_of(**settings)
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    model, optimizer = accelerator.prepare(model, optimizer)
    groups = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    return model, optimizer, groups


@torch.no_grad()
def distance(model, alone, begin):
    """The largest error of a parameter, of the way that it went."""
    triples = zip(model.parameters(), alone.parameters(), begin.parameters(), strict=True)
    ways = [(float((p.full_tensor() - q).norm()), float((q - b).norm())) for p, q, b in triples]
    assert all(way > 0 for _, way in ways)
    return max(error / way for error, way in ways)


def evaluations(model, inside, ids):
    """How often the solves of these tokens evaluate the module inside."""
    counts = []
    hook = model.get_submodule(inside).register_forward_hook(lambda *_: counts.append(1))
    with torch.no_grad():
        model(ids, use_cache=False)
    hook.remove()
    return len(counts)


def trained(model, inside, **settings):
    """How far two processes end from one, with batches of different lengths."""
    rank, world = dist.get_rank(), dist.get_world_size()
    begin, alone = copy.deepcopy(model), copy.deepcopy(model).train()
    ours = torch.optim.SGD(alone.parameters(), 0.3)
    together, optimizer, groups = sharded(model.train(), **settings)
    predicted = sum(2 * (length - 1) for length in LENGTHS)
    for step in range(STEPS):
        for each, parts in ((alone, range(world)), (together, [rank])):
            dpp.set_step(each, step)
            for part in parts:  # FSDP takes the mean over processes
                scale = world if each is together else 1
                (scale * loss_of(each, tokens(part, step), predicted)).backward()
        for each in (ours, optimizer):
            each.step()
            each.zero_grad()
    return {
        "groups": groups,
        "apart": distance(together, alone, begin),
        "evaluations": evaluations(begin, inside, tokens(rank, 0)),
    }


def evaluated():
    """Logits, caches and generation of one that Accelerate has sharded, with different lengths."""
    model = make().eval()
    alone, ids = copy.deepcopy(model), tokens(dist.get_rank(), 0)
    model, *_ = sharded(model)
    register_fsdp_forward_method(model, "generate")  # as a Trainer does
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        found, wanted = model(ids), alone(ids)
        made = model.generate(ids, max_new_tokens=4, synced_gpus=True, **settings)
        return {
            "cached": found.past_key_values is not None or found.cache is not None,
            "logits": float((found.logits - wanted.logits).abs().max()),
            "same text": torch.equal(made, alone.generate(ids, max_new_tokens=4, **settings)),
        }


def block_apart():
    """Caches and attentions with a group of its own for the block, evaluated equally often."""
    model = make(f_solver="fixed_point_iter", f_max_iter=8, f_tol=0.0).eval()
    model.set_attn_implementation("eager")
    alone, ids = copy.deepcopy(model), tokens(0, 0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.model.block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with torch.no_grad():
        both = [each(ids, use_cache=True, output_attentions=True) for each in (model, alone)]
        caches = [getattr(out, "cache", None) or out.past_key_values for out in both]
        more = [
            each(ids[:, :1], past_key_values=cache).logits
            for each, cache in zip((model, alone), caches, strict=True)
        ]
    (found, wanted), (a, b) = both, more
    return {
        "attentions": float((found.attentions[0] - wanted.attentions[0]).abs().max()),
        "logits": float((a - b).abs().max()),
    }


def cases():
    for spec, tied in TRAINED:
        yield f"{spec} | tied={tied}", lambda s=spec, t=tied: trained(make(s, t), "model.block")
    yield "evaluated", evaluated
    yield "block apart", block_apart
    named = {"transformer_cls_names_to_wrap": ["EquilibriumLayer"]}
    yield "converted layer", lambda: trained(converted(), "model.layers.1.layer", **named)


def main():
    with together(20):
        write(everywhere({name: case() for name, case in cases()}))


if __name__ == "__main__":
    main()
