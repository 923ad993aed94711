"""Numbers that the hosts of several processes exchange, apart from what their devices do."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .streaks import Lengths


class Hosts:
    """The hosts of some processes, which exchange a few numbers at a time.

    By a group of their own on gloo: no device is waited for, and a process that has raised in the
    middle of F does not answer a collective of F's with another one.

    Attributes:
        ranks: the processes, by their global ranks.
        lengths: how often they did the same in a row.
    """

    def __init__(self, ranks: tuple[int, ...]) -> None:
        self.ranks, self.lengths = ranks, Lengths()
        # The tensor of the last exchange. The group's thread lets go of it some time later, and if
        # that was the last reference it needs Python, which may have ended by then: an abort.
        self._kept: Tensor | None = None
        options: dict[str, Any] = {"backend": "gloo", "timeout": _timeout()}
        if len(ranks) == dist.get_world_size():
            self._group = dist.new_group(**options)
        else:
            self._group = dist.new_group(list(ranks), **options, use_local_synchronization=True)

    def least(self, numbers: Sequence[int], seconds: float | None = None) -> list[int]:
        """Return the least that a process has of each of some numbers.

        Args:
            numbers: of this one.
            seconds: how long to wait at most; as long as the group does if None.
        """
        tensor = self._kept = torch.tensor(numbers, device="cpu")
        options: Any = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MIN
        work = self._group.allreduce([tensor], options)
        work.wait() if seconds is None else work.wait(timedelta(seconds=seconds))
        found: list[int] = tensor.tolist()
        return found

    def first_of(self, number: int) -> int:
        """Return the number of the first process."""
        numbers = self._kept = torch.tensor([number], device="cpu")
        dist.broadcast(numbers, self.ranks[0], group=self._group)
        return int(numbers)


_known = weakref.WeakKeyDictionary[Any, dict[tuple[int, ...], Hosts]]()  # by default group


def known_hosts(ranks: tuple[int, ...]) -> Hosts | None:
    """Return the hosts of processes, if they have met before."""
    return _known.get(dist.group.WORLD, {}).get(ranks)


def hosts_of(ranks: tuple[int, ...]) -> Hosts | None:
    """Return the hosts of processes, None of fewer than two.

    Raises:
        RuntimeError: if not all of them come.
    """
    if len(ranks) < 2:
        return None
    made = _known.setdefault(dist.group.WORLD, {})
    if ranks not in made:
        try:
            made[ranks] = Hosts(ranks)
        except RuntimeError as error:
            raise RuntimeError(
                f"F communicates, and of the processes {ranks} that were to solve together some "
                "have ended, or have not come in time. Where F's modules communicate in several "
                "groups that is all of the run: process_group=... in the context or of the "
                "equilibrium says which processes run the model"
            ) from error
    return made[ranks]


def ranks_of(group: Any) -> tuple[int, ...]:
    """Return the global ranks of a process group."""
    return tuple(sorted(dist.get_process_group_ranks(group)))


def _timeout() -> timedelta | None:
    """Return that of the default group; what a new group has by default is not that."""
    world: Any = dist.group.WORLD
    for device in world._device_types:
        with suppress(Exception):
            timeout: timedelta = world._get_backend(device).options._timeout
            return timeout
    return None
