"""Small tensors read by the host without waiting for the latest."""

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
    """Numbers that decide whether an iteration goes on.

    On an accelerator the host would wait for all that is queued; it reads the numbers of the
    iteration before instead, so that there is always work queued.

    Args:
        device: where the numbers are.
        convert: from a tensor of the host's to what is returned; lists if None.
    """

    def __init__(
        self, device: torch.device, convert: Callable[[Tensor], Any] = Tensor.tolist
    ) -> None:
        self._convert = convert
        self._waiting: deque[tuple[Tensor, Any]] | None = deque() if self.is_late(device) else None

    @staticmethod
    def is_late(device: torch.device) -> bool:
        """Whether reading costs so much that it is done late."""
        return device.type == "cuda"

    def read(self, numbers: Tensor) -> Any:
        """Return numbers; those of the call before where that is late, None in the first."""
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
        """Return the numbers of a call that were not returned yet, None if there are none."""
        if not self._waiting:
            return None
        copy, event = self._waiting.popleft()
        if event is not None:
            event.synchronize()
        return self._convert(copy)


def as_array(numbers: Tensor) -> NDArray[Any]:
    """Return the numbers of a tensor as the host's, in the same memory if they lie there."""
    if is_functorch_wrapped_tensor(numbers):  # whose memory is not to be had
        dtype = np.dtype(str(numbers.dtype).removeprefix("torch."))
        return np.asarray(numbers.tolist(), dtype).reshape(numbers.shape)
    return numbers.numpy(force=True)
