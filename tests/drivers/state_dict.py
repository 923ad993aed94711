"""Saves and loads models by PyTorch's functions for distributed checkpoints, and Accelerate's.

torchrun --standalone --nproc-per-node 2 state_dict.py OUT.json
"""

import copy
import shutil
import tempfile
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.extras import why_not
from deq_phantom_plugin.hosts.hrm_text import HrmText
from deq_phantom_plugin.patching import Equilibrium
from in_processes import everywhere, together, write

STEP = 7


class Own(nn.Module):
    """A module with memories of its own, one of them first of all."""

    def __init__(self):
        super().__init__()
        self.memory = dpp.Memory()
        self.inner = nn.Linear(4, 4)
        self.memories = nn.ModuleList([dpp.Memory(), dpp.Memory()])


def own():
    return Own()


def patched():
    return nn.Sequential(nn.Linear(4, 4), Equilibrium("upg"))


def torchdeq():
    from torchdeq import get_deq

    return nn.Sequential(nn.Linear(4, 4), get_deq(grad="upg", n_states=2))


def transformer():
    from deq_phantom_plugin.adapters.transformer import (
        DEQTransformerConfig,
        DEQTransformerForCausalLM,
    )

    sizes = {"vocab_size": 12, "hidden_size": 8, "intermediate_size": 16}
    return DEQTransformerForCausalLM(DEQTransformerConfig(num_attention_heads=2, **sizes))


def mdeq():
    from deq_phantom_plugin.adapters.mdeq import MDEQ, MDEQConfig

    return MDEQ(MDEQConfig((8, 8), (2, 4), 16, f_max_iter=6, groups=4, expansion=2))


def ignn():
    from deq_phantom_plugin.adapters.ignn import IGNN

    return IGNN(3, 4, 2, num_layers=2)


def hrm_text():
    from transformers import HrmTextForCausalLM

    from host_cases import HrmTextCase

    return HrmTextForCausalLM(HrmTextCase.config(grad="upg"))


MODELS = {model.__name__: model for model in (own, patched, torchdeq, transformer, mdeq)}
if not why_not("torch_geometric"):
    MODELS["ignn"] = ignn
if HrmText().installed() and not HrmText().why_broken():
    MODELS["hrm_text"] = hrm_text


def sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


WRAPPERS = {
    "plain": lambda model: model,
    "compiled": torch.compile,
    "ddp": DistributedDataParallel,
    "fsdp2": sharded,
}


def options(name, saving):
    """Return options by name; what is loaded by a broadcast was saved without."""
    chosen = set(name.split("+"))
    return StateDictOptions(
        full_state_dict="full" in chosen,
        cpu_offload="offload" in chosen,
        broadcast_from_rank0="broadcast" in chosen and not saving,
        strict="lenient" not in chosen,
    )


OPTIONS = ["sharded", "sharded+lenient", "offload", "full", "full+broadcast"]
OPTIONS += ["full+offload+broadcast", "full+offload+broadcast+lenient"]


def check(model, wanted=STEP):
    memories = [m for m in model.modules() if isinstance(m, dpp.Memory)]
    assert memories
    assert [m.step for m in memories] == [wanted] * len(memories), memories


def weights(model):
    found = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {name: value for name, value in found.items() if not name.endswith("step")}


def same_weights(got, want):
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def pair(make, wrap):
    """Return a model that was told its step, and another one that was not."""
    torch.manual_seed(0)
    source = WRAPPERS[wrap](make())
    dpp.set_step(source, STEP)
    torch.manual_seed(1)
    return source, WRAPPERS[wrap](make())


def by_model_state_dict(make, wrap, name):
    source, target = pair(make, wrap)
    state = get_model_state_dict(source, options=options(name, saving=True))
    if "broadcast" in name and dist.get_rank() != 0:
        state = {}
    elif state:
        steps = [key for key in state if key.endswith("step")]
        assert steps
        assert not {"_orig_mod", "module"} & {part for key in state for part in key.split(".")}
        assert all(state[key].dtype == torch.float64 for key in steps)
        assert all(state[key].shape == () for key in steps)
    result = set_model_state_dict(target, copy.deepcopy(state), options=options(name, False))
    assert not result.unexpected_keys
    check(target)
    same_weights(weights(target), weights(source))


def by_state_dict(make, wrap, flat):
    """With an optimiser."""
    chosen = StateDictOptions(flatten_optimizer_state_dict=flat)
    source, target = pair(make, wrap)
    optimizers = [torch.optim.AdamW(model.parameters()) for model in (source, target)]
    state, optimizer = get_state_dict(source, optimizers[0], options=chosen)
    assert not any("memory" in key for key in optimizer)
    set_state_dict(
        target,
        optimizers[1],
        model_state_dict=state,
        optim_state_dict=optimizer,
        options=chosen,
    )
    check(target)


def shared_folder():
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder, src=0)
    return folder[0]


def by_file(make, wrap):
    """Through files that all processes write together."""
    source, target = pair(make, wrap)
    folder = shared_folder()
    try:
        dcp.save({"model": get_model_state_dict(source)}, checkpoint_id=folder)
        state = {"model": get_model_state_dict(target)}
        dcp.load(state, checkpoint_id=folder)
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder)
    set_model_state_dict(target, state["model"])
    check(target)
    same_weights(weights(target), weights(source))


def by_meta(make):
    """A model that is built without numbers, sharded, and then filled from the first process."""
    torch.manual_seed(0)
    source = make()
    dpp.set_step(source, STEP)
    with torch.device("meta"):
        target = sharded(make())
    state = source.state_dict() if dist.get_rank() == 0 else {}
    set_model_state_dict(target, state, options=options("full+broadcast", False))
    check(target)
    assert list(target.state_dict()) == list(source.state_dict())


def accelerate_plugin(kind):
    from torch.distributed.fsdp import StateDictType

    return SimpleNamespace(
        fsdp_version=2,
        state_dict_type=StateDictType[kind],
        state_dict_config=SimpleNamespace(offload_to_cpu=False, rank0_only=False),
    )


def accelerate_process():
    rank, world = dist.get_rank(), dist.get_world_size()
    return SimpleNamespace(
        num_processes=world,
        process_index=rank,
        is_main_process=rank == 0,
        is_fsdp2=True,
        wait_for_everyone=dist.barrier,
    )


def by_accelerate(make, kind, use_dcp=True):
    from accelerate.state import PartialState
    from accelerate.utils.fsdp_utils import load_fsdp_model, save_fsdp_model

    PartialState(cpu=True)  # its loggers want one
    source, target = pair(make, "fsdp2")
    folder = shared_folder()
    try:
        for function, model in ((save_fsdp_model, source), (load_fsdp_model, target)):
            function(accelerate_plugin(kind), accelerate_process(), model, folder, use_dcp=use_dcp)
            dist.barrier()
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(folder)
    check(target)
    same_weights(weights(target), weights(source))


def by_accelerate_from_meta(make):
    """Accelerate's `cpu_ram_efficient_loading`, as its `fsdp2_prepare_model` goes about it."""
    from accelerate.utils.fsdp_utils import fsdp2_load_full_state_dict

    torch.manual_seed(0)
    model = make()
    dpp.set_step(model, STEP)
    names, whole = list(model.state_dict()), model.state_dict()
    wanted = {name: value.clone() for name, value in whole.items()}
    model = sharded(model.to(torch.device("meta")))
    fsdp2_load_full_state_dict(accelerate_process(), model, whole)
    check(model)
    assert list(model.state_dict()) == names
    for name, value in weights(model).items():
        assert torch.equal(value, wanted[name]), name


def old_checkpoints(make, wrap):
    """Those of 0.1: an integer and a warm start beside it, or no step at all."""
    torch.manual_seed(0)
    source = make()
    steps = [name for name in source.state_dict() if name.endswith("step")]
    bare = {name: value for name, value in source.state_dict().items() if name not in steps}
    warm = [name.removesuffix("step") + "warm_start.adjoint_0" for name in steps]
    told = {**dict.fromkeys(steps, torch.tensor(3)), **dict.fromkeys(warm, torch.ones(2, 3))}
    for extra, wanted in ((told, 3), ({}, None)):
        target = pair(make, wrap)[1]
        set_model_state_dict(target, {**bare, **extra}, options=options("full", False))
        check(target, wanted)
        for kept in dpp.memory_state_dict(target).values():
            assert list(kept["warm_starts"]) == (["adjoint_0"] if extra else [])


def cases():
    """Yield every case: its name, a function and its arguments."""
    for model, make in MODELS.items():
        for wrap in WRAPPERS:
            of = f"{model} | {wrap}"
            for name in OPTIONS:
                yield f"model_state_dict | {of} | {name}", by_model_state_dict, make, wrap, name
            for flat in (False, True):
                yield f"state_dict | {of} | flat={flat}", by_state_dict, make, wrap, flat
            yield f"file | {of}", by_file, make, wrap
        for wrap in ("plain", "fsdp2"):
            yield f"old | {model} | {wrap}", old_checkpoints, make, wrap
    on_meta = [own, patched, torchdeq]  # the others are Transformers', or compute as they are built
    for make in on_meta:
        yield f"meta | {make.__name__}", by_meta, make
    if not why_not("accelerate"):
        for model, make in MODELS.items():
            for kind, together in (("FULL", True), ("SHARDED", True), ("SHARDED", False)):
                name = f"accelerate | {model} | {kind}, {'together' if together else 'apart'}"
                yield name, by_accelerate, make, f"{kind}_STATE_DICT", together
        for make in on_meta:
            yield f"accelerate | {make.__name__} | meta", by_accelerate_from_meta, make


def results():
    """Return what went wrong in each case, None where nothing did."""
    found = {}
    with dpp.enabled():
        for name, function, *arguments in cases():
            try:
                function(*arguments)
                found[name] = None
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"[:1000]
    return found


def main():
    with together():
        write(everywhere(results()))


if __name__ == "__main__":
    main()
