"""Memory of small solves, kept for the next one of the same shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .transforms import in_transform

_SMALL = 2**18  # numbers; beyond, the arithmetic takes longer than what is saved
_MOST = 16  # workspaces that wait


class Workspace:
    """Tensors that a solve works in, and views of them.

    Attributes:
        kind: what solves have in common that can use it; None if it is used once.
    """

    kind: Any = None


W = TypeVar("W", bound=Workspace)


class Workspaces(Generic[W]):
    """Hands out workspaces, and takes them back.

    Where states are small, to make buffers and views of them takes as long as the arithmetic. Each
    solve has a workspace for itself, so that F may hold a solve of its own, and threads may solve
    at once. One that is not given back, since F raised or the result lives in it, is lost.

    On CUDA each stream has its own, as with PyTorch's memory: what is given back may not have been
    computed yet.

    Args:
        make: makes one, from a tensor of the dtype and device and some sizes.
    """

    def __init__(self, make: Callable[..., W]) -> None:
        self._make = make
        self._waiting: dict[Any, list[W]] = {}

    def take(self, like: Tensor, *sizes: int) -> W:
        """Return a workspace; what it holds is left over, and not to be read.

        Args:
            like: a matrix of the dtype and device.
            sizes: what `make` needs to know besides. For each row a workspace holds no more than
                such a number of rows, and of rows so long.
        """
        kind = _kind(like, sizes)
        waiting = self._waiting.get(kind)
        if kind is not None and waiting:
            try:
                return waiting.pop()
            except IndexError:  # another thread was quicker
                pass
        work = self._make(like, *sizes)
        work.kind = kind
        return work

    def give_back(self, work: W) -> None:
        """Take a workspace back, which nobody reads or writes any more."""
        if work.kind is None:
            return
        if sum(map(len, list(self._waiting.values()))) >= _MOST:
            self._waiting.clear()
        self._waiting.setdefault(work.kind, []).append(work)


def _kind(like: Tensor, sizes: tuple[int, ...]) -> Any:
    most = max(sizes)
    if type(like) is not Tensor or max(like.numel(), len(like) * most) * most > _SMALL:
        return None
    if in_transform() or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return None  # what is made there may be no ordinary tensor
    stream = None
    if like.is_cuda:
        if torch.cuda.is_current_stream_capturing():  # a graph writes to its memory ever after
            return None
        stream = torch.cuda.current_stream(like.device).cuda_stream
    elif like.device.type != "cpu":
        return None
    # What is made in inference mode cannot be written elsewhere.
    return like.shape, like.dtype, like.device, stream, sizes, torch.is_inference_mode_enabled()
