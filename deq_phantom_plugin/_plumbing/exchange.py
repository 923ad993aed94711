"""Lets processes exchange a few integers through their CPUs, while their GPUs go on working.

Processes in lockstep (`lockstep.py`) agree by such numbers on what they do next. They use a process
group of their own on the gloo backend.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .streaks import Lengths


class Hosts:
    """The CPUs ("hosts") of some processes, which exchange a few integers at a time.

    They have a process group of their own on gloo, for two reasons. No device is waited for. And
    if a process raises in the middle of F, its message cannot be taken for its part in a collective
    of F.

    Args:
        ranks: the processes, by their global ranks, in ascending order.

    Attributes:
        ranks: as given.
    """

    def __init__(self, ranks: tuple[int, ...]) -> None:
        self.ranks, self._lengths = ranks, Lengths()
        self._by_module = weakref.WeakKeyDictionary[nn.Module, Lengths]()
        # The tensor of the last exchange is kept alive here. The group's thread drops its own
        # reference some time later. If that were the last one, the thread would need the Python
        # interpreter, which may have ended by then, and the process would abort.
        self._kept: Tensor | None = None
        options: dict[str, Any] = {"backend": "gloo", "timeout": _timeout()}
        if len(ranks) == dist.get_world_size():
            self._group = dist.new_group(**options)
        else:
            self._group = dist.new_group(list(ranks), **options, use_local_synchronization=True)

    def lengths_of(self, module: nn.Module | None) -> Lengths:
        """Return how many operations of one kind the processes did in a row, see `streaks.py`.

        Args:
            module: a module inside of F, so that each F has lengths of its own.
        """
        return self._lengths if module is None else self._by_module.setdefault(module, Lengths())

    def least(self, numbers: Sequence[int], seconds: float | None = None) -> list[int]:
        """Return the least of each number over all processes.

        Args:
            numbers: the numbers of this process, equally many in each process.
            seconds: how long to wait for the others at most; None for the group's timeout.

        Raises:
            RuntimeError: if another process has ended, or does not come in time.
        """
        tensor = self._kept = torch.tensor(numbers, device="cpu")
        options: Any = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MIN
        work = self._group.allreduce([tensor], options)
        work.wait() if seconds is None else work.wait(timedelta(seconds=seconds))
        found: list[int] = tensor.tolist()
        return found

    def first_of(self, number: int) -> int:
        """Return the number that the process of the lowest rank gives."""
        numbers = self._kept = torch.tensor([number], device="cpu")
        dist.broadcast(numbers, self.ranks[0], group=self._group)
        return int(numbers)


# By default process group: a new `init_process_group` needs new groups.
_known = weakref.WeakKeyDictionary[Any, dict[tuple[int, ...], Hosts]]()


def known_hosts(ranks: tuple[int, ...]) -> Hosts | None:
    """Return the hosts of some processes if they have been made before, else None."""
    return _known.get(dist.group.WORLD, {}).get(ranks)


def hosts_of(ranks: tuple[int, ...]) -> Hosts | None:
    """Return the hosts of some processes, made if need be; None for fewer than two processes.

    Raises:
        RuntimeError: if one of the processes does not come to make the group.
    """
    if len(ranks) < 2:
        return None
    made = _known.setdefault(dist.group.WORLD, {})
    if ranks not in made:
        try:
            made[ranks] = Hosts(ranks)
        except RuntimeError as error:
            raise RuntimeError(
                f"F communicates, so the processes {ranks} have to solve together, and some of "
                "them have ended, or have not come in time. If only some of them run the model, "
                "name these: pass process_group=... to the equilibrium or the context. Where F's "
                "modules communicate in several groups, all processes of the run are waited for"
            ) from error
    return made[ranks]


def ranks_of(group: Any) -> tuple[int, ...]:
    """Return the global ranks of a process group, in ascending order."""
    return tuple(sorted(dist.get_process_group_ranks(group)))


def _timeout() -> timedelta | None:
    """Return the timeout of the default group, None if unknown; a new group does not inherit it."""
    world: Any = dist.group.WORLD
    for device in world._device_types:
        with suppress(Exception):
            timeout: timedelta = world._get_backend(device).options._timeout
            return timeout
    return None
