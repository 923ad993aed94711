"""What an equilibrium remembers from one training step to the next."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from .trial import Trial


class Memory(nn.Module):
    """The training step and warm starts of one equilibrium of one model.

    A module, so that it is found by `dpp.set_step`, copied with its model, and saved and
    resumed through the model's `state_dict`. It adds no key there until it holds something, and
    misses none when an older checkpoint is loaded.

    Attributes:
        step: the training step, None until `dpp.set_step` or a host has told it.
        failures: samples in which a solve failed, "forward" and "adjoint"; see `guard`. Not saved.
    """

    def __init__(self) -> None:
        super().__init__()
        self.step: int | None = None
        self.failures: Counter[str] = Counter()
        self._warm_starts: dict[str, Tensor] = {}

    def warm_start(self, name: str, like: Tensor) -> Tensor | None:
        """Return the tensor kept under `name`, if it fits `like` in shape; cast to its dtype."""
        kept = self._warm_starts.get(name)
        if kept is None or kept.shape != like.shape:
            return None
        return kept.to(device=like.device, dtype=like.dtype)

    def keep(self, name: str, value: Tensor) -> None:
        """Keep a detached tensor under `name` for the next step; what a trial found is not kept."""
        if not Trial.depth():
            self._warm_starts[name] = value.detach()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.step is not None:
            destination[prefix + "step"] = torch.tensor(self.step)
        for name, value in self._warm_starts.items():
            destination[f"{prefix}warm_start.{name}"] = value

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        start = f"{prefix}warm_start."
        try:
            step = _step(prefix + "step", state_dict.get(prefix + "step"))
            kept = {
                key[len(start) :]: _leaf(key, value).detach().clone()
                for key, value in state_dict.items()
                if key.startswith(start)
            }
        except ValueError as error:
            error_msgs.append(str(error))
        else:
            self.step, self._warm_starts = step, kept

    def extra_repr(self) -> str:
        """Show what is held."""
        failures = f", failures={dict(self.failures)}" if self.failures else ""
        return f"step={self.step}, warm_starts={sorted(self._warm_starts)}{failures}"


def _step(key: str, value: Any) -> int | None:
    """Return the step of a checkpoint."""
    if value is None:
        return None
    try:
        if isinstance(value, str | bytes):  # which `int` would take
            raise TypeError
        step = int(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        step = -1
    if not 0 <= step < 2**63:
        raise ValueError(f"{key} is {value!r}; expected a whole number of at least 0")
    return step


def _leaf(key: str, value: Any) -> Tensor:
    """Return a tensor of a checkpoint, if a gradient could be like it."""
    if isinstance(value, Tensor):
        numbers = value.is_floating_point() or value.is_complex()
        if numbers and value.layout is torch.strided and not (value.is_meta or value.is_nested):
            return value
    raise ValueError(f"{key} is {value!r:.60}; expected a dense tensor of floating-point numbers")
