"""Measures the seconds and the bytes that a piece of code takes, on any device."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def now(device: torch.device) -> float:
    """Wait until all work queued on the device is done, and return the time in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """Return how many bytes of tensors a call held at its peak, above what was there before.

    On CUDA the allocator gives the number. Elsewhere each tensor that an operation returns is
    followed until it is freed. So what is kept between operations is counted exactly, and scratch
    space inside an operation is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        peak: int = torch.cuda.max_memory_allocated(device) - before
        return peak
    live = _LiveStorages()
    with live:
        function()
    return live.peak


class _LiveStorages(TorchDispatchMode):
    """Adds up the storages of tensors that operations return, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # An input that no operation here returned was there before, as parameters are: no bytes.
        for storage in _storages((args, kwargs)):
            self._follow(storage, 0)
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._follow(storage, storage.nbytes())
        return result

    def _follow(self, storage: torch.UntypedStorage, size: int) -> None:
        """Count the bytes of a storage from now on until it is freed; each storage once."""
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    """Yield the storages of all tensors in a tree; a sparse tensor has several."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            parts = [getattr(leaf, name)() for name in _SPARSE_PARTS.get(leaf.layout, ())]
            for part in parts or [leaf]:
                yield part.untyped_storage()


_BY_ROW = ("crow_indices", "col_indices", "values")
_BY_COLUMN = ("ccol_indices", "row_indices", "values")
_SPARSE_PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: _BY_ROW,
    torch.sparse_bsr: _BY_ROW,
    torch.sparse_csc: _BY_COLUMN,
    torch.sparse_bsc: _BY_COLUMN,
}
