"""Products through modules that FSDP2 shards, within a forward pass that goes on after them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn


class Unfinished(AbstractContextManager["Unfinished"]):
    """Take a product inside a `with` block, in whose middle the forward pass of the model may be.

    For FSDP2 a backward pass through any of its modules ends that of the whole model: the weights
    of modules that still run are freed, and what they do next fails. That is kept off here. And
    modules are left as they were found, or a forward pass that a reentrant checkpoint repeats in
    backward would lose the gradient of their weights. PyTorch has no public names for it.

    Args:
        modules: what runs in F.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)
        self._kept: list[tuple[Any, bool, list[tuple[Any, Any]]]] = []

    def __enter__(self) -> Unfinished:
        for context in _contexts(self._modules):
            parts = [p for state in context.all_states for p in (state, *_groups(state))]
            # In a backward pass its end is one.
            ends = context.iter_forward_root is None or context.post_backward_final_callback_queued
            self._kept.append((context, ends, [(part, part._training_state) for part in parts]))
            if not ends:
                context.post_backward_final_callback_queued = True
        return self

    def __exit__(self, *error: object) -> None:
        for context, ends, before in self._kept:
            if not ends:
                context.post_backward_final_callback_queued = False
            for part, state in before:
                # Of an input without a gradient nobody says that its backward pass is over.
                left = part._training_state.name == "PRE_BACKWARD" != state.name
                if left and hasattr(part, "post_backward"):
                    part.post_backward()
                part._training_state = state
        self._kept.clear()


def may_be_sharded() -> bool:
    """Whether any module may be, in a process that is perhaps the only one."""
    return "torch.distributed.fsdp" in sys.modules


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 shards a module in a group of its own."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return isinstance(module, getattr(fsdp, "FSDPModule", ()))


def meshes(module: nn.Module) -> list[Any]:
    """Return the device meshes over which FSDP2 shards a module."""
    return [group.mesh_info.mesh for group in _groups(_state(module))]


def _state(module: Any) -> Any:
    return module._get_fsdp_state()


def _groups(state: Any) -> list[Any]:
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # before PyTorch 2.12 there is at most one
        groups = [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def _contexts(modules: Iterable[nn.Module]) -> list[Any]:
    found = {}
    for module in modules:
        context = _state(module)._state_ctx
        found[id(context)] = context
    return list(found.values())
