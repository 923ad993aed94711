"""Whether equilibria are finite. On an accelerator that is found out one call later."""

from __future__ import annotations

import cmath
import math
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._plumbing.late_read import LateRead
from .._plumbing.transforms import in_torch_func

_ADVICE = (
    "the forward solve diverged. Check its residual; a smaller step, more normalisation or another "
    "solver may help"
)


def check_finite(leaves: Sequence[Tensor], whose: Callable[[], str] | None = None) -> None:
    """Refuse an equilibrium that holds a NaN or an infinity.

    On an accelerator a look at once would wait for the whole solve. So the host looks at this
    equilibrium when the thread attaches the next one on that device, and refuses then.

    Nothing is looked at where numbers are hidden: inside a transform of `torch.func` such as vmap,
    in compiled code, while a CUDA graph is captured, and on the meta device.

    Args:
        leaves: the leaves of the equilibrium.
        whose: returns in words which equilibrium it is, for an error one call later. None makes the
            host wait, and look at once.

    Raises:
        ValueError: if it holds one, or if the equilibrium before it did.
    """
    if in_torch_func() or torch.compiler.is_compiling():
        return
    device = leaves[0].device
    if device.type == "meta":
        return
    if whose is None or not LateRead.is_late(device):
        _look(leaves)
    elif not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        _look_later(leaves, whose())


def _look(leaves: Sequence[Tensor]) -> None:
    for index, leaf in enumerate(leaves):
        # A sum is several times faster. It can overflow, so a second look decides.
        if not cmath.isfinite(leaf.sum().item()) and not torch.isfinite(leaf).all():
            where = f"leaf {index} of the equilibrium" if len(leaves) > 1 else "the equilibrium"
            raise ValueError(f"{where} holds NaN or Inf: {_ADVICE}")


class _Later(threading.local):
    """What a thread has not looked at yet: for each device the numbers, and whose they are."""

    def __init__(self) -> None:
        self.waiting: dict[torch.device, tuple[LateRead, str]] = {}


_later = _Later()


def _look_later(leaves: Sequence[Tensor], name: str) -> None:
    device = leaves[0].device
    reader, before = _later.waiting.pop(device, (LateRead(device), ""))
    # The largest number decides: a sum can overflow, and there is no second look here.
    known = [
        torch.linalg.vector_norm(leaf, ord=math.inf).isfinite().to(device)
        for leaf in leaves
        if leaf.numel()
    ]
    found = reader.read(torch.stack(known or [torch.ones((), dtype=torch.bool, device=device)]))
    if found is not None and not all(found):
        raise ValueError(
            f"the equilibrium attached before this one ({before}) holds NaN or Inf: {_ADVICE}. "
            "This is said one call late, because an earlier look would have to wait for the device"
        )
    _later.waiting[device] = reader, name
