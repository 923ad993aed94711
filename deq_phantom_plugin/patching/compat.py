"""Shims that let old research code run with current versions of its libraries.

A shim restores a function that a library has removed, or stands in for a package that is not
installed. No shim is applied unless it is asked for by name (`--compat NAME`).

This file is also copied beside the modules of other processes, see `inject`. So it imports torch
and NumPy only inside the shims, and nothing of this package.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any


def apply(*names: str) -> None:
    """Apply shims by name.

    A shim whose library is not installed is skipped, with a line on stderr.

    Args:
        *names: keys of `SHIMS`.

    Raises:
        ValueError: if a name is not a key of `SHIMS`.
    """
    for name in names:
        if name not in SHIMS:
            raise ValueError(
                f"unknown compatibility shim {name!r}; expected one of {', '.join(SHIMS)}"
            )
        try:
            SHIMS[name]()
        except ModuleNotFoundError as error:
            print(f"deq-phantom: the shim {name} was not applied: {error}", file=sys.stderr)


def _cpu() -> None:
    """Without CUDA, `.cuda()`, `with torch.device("cuda")` and CUDA types mean the CPU."""
    import torch

    if torch.cuda.is_available():
        return
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    for name in ("synchronize", "empty_cache", "manual_seed", "manual_seed_all", "set_device"):
        # One function object per name: torch.compile keeps a table of these functions.
        setattr(torch.cuda, name, lambda *args, **kwargs: None)
    torch.version.cuda = torch.version.cuda or "0.0"  # scripts split it as a string
    original = torch.set_default_tensor_type

    def set_default_tensor_type(kind: Any) -> None:
        name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__name__}"
        original(name.replace("torch.cuda.", "torch."))

    torch.set_default_tensor_type = set_default_tensor_type

    from torch.utils._device import DeviceContext

    enter = DeviceContext.__init__

    def __init__(self: DeviceContext, device: torch.device) -> None:
        enter(self, torch.device("cpu") if device.type == "cuda" else device)

    DeviceContext.__init__ = __init__  # type: ignore[method-assign]


def _linalg() -> None:
    """`torch.solve(B, A)` works again: it calls `torch.linalg.solve(A, B)`."""
    import torch

    def solve(right: Any, left: Any) -> tuple[Any, None]:
        return torch.linalg.solve(left, right), None

    torch.solve = solve  # type: ignore[assignment,attr-defined]


def _load() -> None:
    """`torch.load` unpickles whole models, as before 2.6; use it only for files that you trust."""
    import functools

    import torch

    if not isinstance(torch.load, functools.partial):
        torch.load = functools.partial(torch.load, weights_only=False)


def _numpy() -> None:
    """`np.int`, `np.float`, `np.bool`, `np.object`, `np.str`, `np.Inf` and `np.NaN` work again."""
    import numpy as np

    names: dict[str, Any] = {"int": int, "float": float, "bool": bool, "object": object}
    names |= {"str": str, "Inf": np.inf, "NaN": np.nan}
    for name, meaning in names.items():
        if name not in vars(np):
            setattr(np, name, meaning)


def _torch_sparse() -> None:
    """`import torch_sparse` works without the package, for code that never calls it."""
    _stand_in("torch_sparse")


def _flash_attn() -> None:
    """`flash_attn_func` works without the package, by `scaled_dot_product_attention`."""
    from torch.nn.functional import scaled_dot_product_attention

    def flash_attn_func(
        q: Any,
        k: Any,
        v: Any,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
    ) -> Any:
        """Attend. Shapes are (batch, length, heads, dim); k and v may have fewer heads."""
        # With unequal lengths, FlashAttention aligns its causal mask at the end, PyTorch at the
        # beginning.
        if causal and q.shape[1] != k.shape[1]:
            raise ValueError(
                f"causal=True with {q.shape[1]} queries and {k.shape[1]} keys, which the shim "
                "flash_attn cannot mask as FlashAttention does; expected as many keys as queries, "
                "or flash_attn itself"
            )
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        attended = scaled_dot_product_attention(
            q, k, v, dropout_p=dropout_p, is_causal=causal, scale=softmax_scale
        )
        return attended.transpose(1, 2).contiguous()

    _stand_in("flash_attn", flash_attn_func=flash_attn_func)


def _adam_atan2() -> None:
    """`AdamATan2` works without the package `adam_atan2`, in plain PyTorch."""
    import torch

    class AdamATan2(torch.optim.Optimizer):
        """Adam with decoupled weight decay, and atan2(m, sqrt(v)) for m / (sqrt(v) + eps)."""

        def __init__(
            self,
            params: Any,
            lr: float = 1e-3,
            betas: tuple[float, float] = (0.9, 0.99),
            weight_decay: float = 1e-2,
        ) -> None:
            super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

        @torch.no_grad()
        def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
            """Take a step, and return what the closure returns."""
            loss = None if closure is None else torch.enable_grad()(closure)()
            for group in self.param_groups:
                first, second = group["betas"]
                for p in (p for p in group["params"] if p.grad is not None):
                    state = self.state[p]
                    if not state:
                        zeros = [torch.zeros_like(p) for _ in range(2)]
                        state.update(step=0, exp_avg=zeros[0], exp_avg_sq=zeros[1])
                    state["step"] += 1
                    state["exp_avg"].lerp_(p.grad, 1 - first)
                    state["exp_avg_sq"].lerp_(p.grad.square(), 1 - second)
                    mean = state["exp_avg"] / (1 - first ** state["step"])
                    square = state["exp_avg_sq"] / (1 - second ** state["step"])
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(group["lr"] * torch.atan2(mean, square.sqrt()))
            return loss

    _stand_in("adam_atan2", AdamATan2=AdamATan2)


def _stand_in(name: str, **content: Any) -> None:
    """Register a module with this content under the name of a package that is not installed."""
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        return
    module = types.ModuleType(name)
    module.__spec__ = importlib.util.spec_from_loader(name, None)  # `find_spec` asks for one
    vars(module).update(content)
    sys.modules[name] = module


SHIMS: dict[str, Callable[[], None]] = {
    "adam_atan2": _adam_atan2,
    "cpu": _cpu,
    "flash_attn": _flash_attn,
    "linalg": _linalg,
    "load": _load,
    "numpy": _numpy,
    "torch_sparse": _torch_sparse,
}
"""The shims by name. The command line prints the first line of a shim's docstring."""

LIBRARY = dict.fromkeys(("adam_atan2", "cpu", "flash_attn", "linalg", "load"), "torch")
LIBRARY["numpy"] = "numpy"
"""The module after whose import a shim is applied. A shim that is not here needs no import."""
