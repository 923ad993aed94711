"""Keeps the buffers of small solves for the next solve of the same shape.

For small states it takes as long to make buffers and views of them as to do the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .transforms import in_transform

_SMALL = 2**18  # numbers in a buffer; for larger buffers the arithmetic takes most of the time
_MOST = 16  # how many workspaces are kept


class Workspace:
    """The tensors that a solve works in, and views of them.

    Attributes:
        kind: the key of the solves that can use the workspace; None if it is used only once.
    """

    kind: Any = None


W = TypeVar("W", bound=Workspace)


class Workspaces(Generic[W]):
    """Hands out workspaces, and takes them back.

    Each solve has a workspace for itself, so that F may contain a solve of its own, and threads may
    solve at the same time. A workspace that is not given back is not used again. That is so if F
    raises, or if the result lives in the workspace.

    On CUDA each stream has its own workspaces. Work on a workspace that was given back may still be
    queued, and only later work on the same stream is sure to come after it.

    Args:
        make: makes a workspace from a tensor, for its dtype and device, and some sizes.
    """

    def __init__(self, make: Callable[..., W]) -> None:
        self._make = make
        self._waiting: dict[Any, list[W]] = {}

    def take(self, like: Tensor, *sizes: int) -> W:
        """Return a workspace, whose values are left over from other solves.

        Args:
            like: a matrix of the dtype and device, shape (B, D).
            *sizes: the other arguments of `make`. Per row of `like` a workspace holds at most
                max(sizes) rows of length D, and as many of length max(sizes).
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
        """Take a workspace back that the caller does not read or write any more."""
        if work.kind is None:
            return
        if sum(map(len, list(self._waiting.values()))) >= _MOST:
            self._waiting.clear()
        self._waiting.setdefault(work.kind, []).append(work)


def _kind(like: Tensor, sizes: tuple[int, ...]) -> Any:
    """Return the key of a workspace; None if the workspace must not be kept."""
    most = max(sizes)
    if type(like) is not Tensor or max(like.numel(), len(like) * most) * most > _SMALL:
        return None
    if in_transform() or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return None  # tensors that are made here may be special ones
    stream = None
    if like.is_cuda:
        if torch.cuda.is_current_stream_capturing():  # replays of a CUDA graph reuse its memory
            return None
        stream = torch.cuda.current_stream(like.device).cuda_stream
    elif like.device.type != "cpu":
        return None
    # A tensor that is made in inference mode cannot be written outside of it.
    return like.shape, like.dtype, like.device, stream, sizes, torch.is_inference_mode_enabled()
