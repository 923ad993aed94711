"""Notices whether an exception has cut an operation before its last collective.

Processes that do an operation together begin equally many collectives in it. If one process raises
between two of them, the others wait in the next one. It must then not begin any other collective:
theirs would be taken for another one, of another size perhaps, and gloo aborts the process on that.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch.distributed as dist


class Operations(AbstractContextManager["Operations"]):
    """Enter it for each operation, one after another. All take about as many collectives.

    Attributes:
        cut: whether the latest operation has ended by an exception, and in it this process had not
            begun as many collectives as in the operation before, or nobody knows.
    """

    def __init__(self) -> None:
        self.cut = False
        self._usual: int | None = None
        self._before: int | None = None

    def __enter__(self) -> Operations:
        self._before = _n_collectives()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        now = _n_collectives()
        taken = None if now is None or self._before is None else now - self._before
        if error is None:
            self.cut, self._usual = False, taken
        else:
            self.cut = taken is None or taken != self._usual


def _n_collectives() -> int | None:
    """Return how many collectives this process has begun, in all groups; None if nobody counts."""
    try:
        groups: Any = dist.distributed_c10d._world.pg_map
        return sum(int(group._get_sequence_number_for_group()) for group in list(groups))
    except (AttributeError, RuntimeError):  # private names; some backends do not count
        return None
