"""Finds out whether F communicates with other processes, and with which ones.

A hook looks at each module that runs in an evaluation of F. Sharded parameters (`DTensor`s) tell
the processes among which they are sharded. Some modules communicate without such parameters, and
are known by their type. If F communicates, the processes solve in lockstep (`lockstep.py`).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from .compilation import hooks_unsaid
from .sharding import is_sharded, meshes


class Communication(AbstractContextManager["Communication"]):
    """Looks at the modules that this thread runs inside a `with` block.

    - Parameters that are `DTensor`s tell their processes: those of tensor parallel, and those of
      FSDP2. FSDP2 gathers them when the module runs, and the hook looks just before that.
    - FSDP 1 and `SyncBatchNorm` in training are known by their type.
    - A collective that F calls by itself is not seen.

    Args:
        holders: groups of processes that communicate in any case, by their global ranks.

    Attributes:
        ranks: the processes among which modules communicate, by their global ranks. It is empty if
            no module communicates. It holds all processes of the run if modules communicate in
            groups of which none contains the others.
        sharded: the modules that FSDP2 shards in groups of their own.
        first: the module that ran first, None if none ran.
    """

    def __init__(self, holders: Sequence[tuple[int, ...]] = ()) -> None:
        self.ranks: tuple[int, ...] = ()
        self.sharded: list[nn.Module] = []
        self.first: nn.Module | None = None
        self._stack = ExitStack()
        for ranks in holders:
            self._note(ranks)

    def __enter__(self) -> Communication:
        thread = threading.get_ident()

        def look(module: nn.Module, args: Any) -> None:
            if threading.get_ident() == thread:
                self.first = module if self.first is None else self.first
                if is_sharded(module):
                    self.sharded.append(module)
                for ranks in map(tuple, map(sorted, _ranks(module))):
                    self._note(ranks)

        self._stack.enter_context(hooks_unsaid())
        self._stack.callback(register_module_forward_pre_hook(look).remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _note(self, ranks: tuple[int, ...]) -> None:
        """Add a group of processes to those known; see `ranks` for groups that differ."""
        if set(ranks) <= set(self.ranks) or len(ranks) < 2:
            return
        if not set(self.ranks) <= set(ranks):
            ranks = tuple(range(dist.get_world_size()))
        self.ranks = ranks


def _ranks(module: nn.Module) -> Iterator[list[int]]:
    """Yield the global ranks of each group in which a module communicates."""
    tensors, fsdp = (sys.modules.get(f"torch.distributed.{name}") for name in ("tensor", "fsdp"))
    kind = getattr(tensors, "DTensor", ())
    shards = is_sharded(module)
    for parameter in module.parameters() if shards else module._parameters.values():
        if isinstance(parameter, kind):
            yield _of_mesh(parameter.device_mesh)
    if shards:  # its weights may be gathered already, and are no `DTensor`s then
        yield from map(_of_mesh, meshes(module))
    elif isinstance(module, getattr(fsdp, "FullyShardedDataParallel", ())):
        group: Any = module.process_group
        yield dist.get_process_group_ranks(group)
    elif isinstance(module, nn.SyncBatchNorm) and module.training:
        yield dist.get_process_group_ranks(module.process_group or dist.group.WORLD)


def _of_mesh(mesh: Any) -> list[int]:
    """Return the global ranks of a `DeviceMesh`."""
    ranks: list[int] = mesh.mesh.flatten().tolist()
    return ranks
