"""Shims that let old research code run on today's torch; off unless asked for by name."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any


def apply(*names: str) -> None:
    """Apply shims by name; those of libraries that are not installed are passed over.

    Raises:
        ValueError: if there is no shim of a name.
    """
    for name in names:
        if name not in SHIMS:
            raise ValueError(f"unknown compatibility shim {name!r}; there are {', '.join(SHIMS)}")
        try:
            SHIMS[name]()
        except ModuleNotFoundError as error:
            print(f"deq-phantom: shim {name} not applied: {error}", file=sys.stderr)


def _cpu() -> None:
    """Without CUDA, `.cuda()`, `torch.cuda.synchronize()` and CUDA types mean the CPU."""
    import torch

    if torch.cuda.is_available():
        return
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    for name in ("synchronize", "empty_cache", "manual_seed", "manual_seed_all", "set_device"):
        # One object a name: torch.compile keeps a table of these functions.
        setattr(torch.cuda, name, lambda *args, **kwargs: None)
    torch.version.cuda = torch.version.cuda or "0.0"  # which scripts take apart
    original = torch.set_default_tensor_type

    def set_default_tensor_type(kind: Any) -> None:
        name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__name__}"
        original(name.replace("torch.cuda.", "torch."))

    torch.set_default_tensor_type = set_default_tensor_type


def _linalg() -> None:
    """`torch.solve(B, A)` is back, as `torch.linalg.solve(A, B)`."""
    import torch

    def solve(right: Any, left: Any) -> tuple[Any, None]:
        return torch.linalg.solve(left, right), None

    torch.solve = solve  # type: ignore[assignment,attr-defined]


def _load() -> None:
    """`torch.load` unpickles whole models, as it did before 2.6; only for files you trust."""
    import functools

    import torch

    if not isinstance(torch.load, functools.partial):
        torch.load = functools.partial(torch.load, weights_only=False)


def _numpy() -> None:
    """`np.int`, `np.float`, `np.bool`, `np.object`, `np.str` and `np.Inf` are back."""
    import numpy as np

    names: dict[str, Any] = {"int": int, "float": float, "bool": bool, "object": object}
    names |= {"str": str, "Inf": np.inf, "NaN": np.nan}
    for name, meaning in names.items():
        if name not in vars(np):
            setattr(np, name, meaning)


def _torch_sparse() -> None:
    """`import torch_sparse` works where it is not installed, for code that never calls it."""
    try:
        import torch_sparse  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        sys.modules["torch_sparse"] = types.ModuleType("torch_sparse")


SHIMS: dict[str, Callable[[], None]] = {
    "cpu": _cpu,
    "linalg": _linalg,
    "load": _load,
    "numpy": _numpy,
    "torch_sparse": _torch_sparse,
}
"""Name -> shim; the first line of its docstring says what it does."""

LIBRARY = {"cpu": "torch", "linalg": "torch", "load": "torch", "numpy": "numpy"}
"""The module after whose import a shim can be applied; the others need none."""
