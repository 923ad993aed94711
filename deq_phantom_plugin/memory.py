"""What an equilibrium remembers from one training step to the next."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn


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
        """Keep a detached tensor under `name` for the next step."""
        self._warm_starts[name] = value.detach()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.step is not None:
            destination[prefix + "step"] = torch.tensor(self.step)
        for name, value in self._warm_starts.items():
            destination[f"{prefix}warm_start.{name}"] = value

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        step = state_dict.get(prefix + "step")
        self.step = None if step is None else int(step)
        start = f"{prefix}warm_start."
        self._warm_starts = {
            key[len(start) :]: value.detach().clone()
            for key, value in state_dict.items()
            if key.startswith(start)
        }

    def extra_repr(self) -> str:
        """Show what is held."""
        failures = f", failures={dict(self.failures)}" if self.failures else ""
        return f"step={self.step}, warm_starts={sorted(self._warm_starts)}{failures}"
