"""Reads small tensors on the CPU without waiting for the GPU.

A solver reads residuals to know when to stop. If it read the latest ones, the CPU would wait until
the GPU has done all queued work. So on a GPU it reads those of the iteration before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor


class LateRead:
    """Reads the numbers by which an iteration decides whether to go on.

    On a GPU each call returns the numbers of the call before. So the GPU always has work queued.

    Args:
        device: the device of the numbers.
        convert: turns a tensor on the CPU into what is returned; by default `Tensor.tolist`.
    """

    def __init__(
        self, device: torch.device, convert: Callable[[Tensor], Any] = Tensor.tolist
    ) -> None:
        self._convert = convert
        self._waiting: deque[tuple[Tensor, Any]] | None = deque() if self.is_late(device) else None

    @staticmethod
    def is_late(device: torch.device) -> bool:
        """Whether numbers of this device are read one call late."""
        return device.type == "cuda"

    def read(self, numbers: Tensor) -> Any:
        """Return the numbers. If reads are late: those of the call before, None in the first."""
        if self._waiting is None:
            return self._convert(numbers)
        on_device = numbers.is_cuda
        copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=on_device, device="cpu")
        copy.copy_(numbers, non_blocking=True)
        event = None
        if on_device:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(numbers.device))
        self._waiting.append((copy, event))
        return None if len(self._waiting) < 2 else self.last()

    def last(self) -> Any:
        """Return the oldest numbers that were not returned yet, None if there are none."""
        if not self._waiting:
            return None
        copy, event = self._waiting.popleft()
        if event is not None:
            event.synchronize()
        return self._convert(copy)


def as_array(numbers: Tensor) -> NDArray[Any]:
    """Return a tensor as a NumPy array; a tensor on the CPU shares its memory with the array."""
    if is_functorch_wrapped_tensor(numbers):  # the memory of a wrapped tensor is not accessible
        dtype = np.dtype(str(numbers.dtype).removeprefix("torch."))
        return np.asarray(numbers.tolist(), dtype).reshape(numbers.shape)
    return numbers.numpy(force=True)
