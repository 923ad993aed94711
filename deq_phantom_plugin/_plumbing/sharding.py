"""FSDP2 modules inside of F: which ones there are, and backward passes in mid forward pass.

FSDP2 expects one forward pass of a model and then one backward pass. Strategies take products with
the Jacobian of F, which are backward passes, while the forward pass of the model still goes on.
`Unfinished` makes this possible. It uses private names of PyTorch, since there are no public ones.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn


class Unfinished(AbstractContextManager["Unfinished"]):
    """Take a product inside a `with` block, while the model's forward pass may still go on.

    At the end of a backward pass through any of its modules FSDP2 takes the backward pass of the
    whole model for finished. It would free the weights of modules that still run, and these would
    fail. The block keeps FSDP2 from that.

    After the block all modules are in the state in which they were before. Otherwise a forward pass
    that reentrant checkpointing repeats in backward would lose the gradients of their weights.

    Args:
        modules: the modules inside of F that FSDP2 shards.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)
        self._kept: list[tuple[Any, bool, list[tuple[Any, Any]]]] = []

    def __enter__(self) -> Unfinished:
        for context in _contexts(self._modules):
            parts = [p for state in context.all_states for p in (state, *_groups(state))]
            # Without a forward pass that goes on, or within the model's own backward pass, FSDP2
            # is right to end it.
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
                # FSDP2 does not notice the end of a module's backward pass if the module's inputs
                # need no gradient. So this ends it.
                left = part._training_state.name == "PRE_BACKWARD" != state.name
                if left and hasattr(part, "post_backward"):
                    part.post_backward()
                part._training_state = state
        self._kept.clear()


def may_be_sharded() -> bool:
    """Whether FSDP2 is loaded, so that modules may be sharded, even over a single process."""
    return "torch.distributed.fsdp" in sys.modules


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 shards a module in a group of its own."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return isinstance(module, getattr(fsdp, "FSDPModule", ()))


def meshes(module: nn.Module) -> list[Any]:
    """Return the device meshes over which FSDP2 shards a module."""
    return [group.mesh_info.mesh for group in _groups(_state(module))]


def _state(module: Any) -> Any:
    """Return FSDP2's state of a module."""
    return module._get_fsdp_state()


def _groups(state: Any) -> list[Any]:
    """Return the groups of parameters that FSDP2 gathers together."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # before PyTorch 2.12 a module has at most one group
        groups = [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def _contexts(modules: Iterable[nn.Module]) -> list[Any]:
    """Return what FSDP2 knows of the models that the modules belong to, once for each model."""
    found = {}
    for module in modules:
        context = _state(module)._state_ctx
        found[id(context)] = context
    return list(found.values())
