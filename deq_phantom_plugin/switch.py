"""Switch, step and ask every equilibrium inside a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from .hosts import find_equilibria
from .memory import Memory
from .registry import Spec


def set_grad(module: nn.Module, spec: Spec | list[Spec]) -> int:
    """Switch every equilibrium inside a model to another strategy, in place, mid-training.

    Args:
        module: the model; its equilibria are found through the installed hosts.
        spec: the new strategy, see `get_strategy`; whatever the host takes as `grad` goes too.

    Returns:
        How many equilibria were switched; 0 if the model has none.

    Raises:
        ValueError: if the spec is invalid; then nothing is switched.
        TypeError: if `module` is no `torch.nn.Module`.
    """
    found = find_equilibria(_module(module))
    switches = [host.prepare_grad(equilibrium, spec) for host, equilibrium in found]
    for switch in switches:
        switch()
    return len(switches)


def set_step(module: nn.Module, step: int) -> None:
    """Tell every equilibrium inside a model the training step (optimiser steps, from 0).

    Args:
        module: the model.
        step: the step that the next forward pass belongs to.

    Raises:
        ValueError: if `step` is not a whole number of at least 0.
    """
    if not _whole(step):
        raise ValueError(f"step={step!r}; expected a whole number of at least 0")
    for memory in _module(module).modules():
        if isinstance(memory, Memory):
            memory.step = int(step)


def failures(module: nn.Module) -> dict[str, int]:
    """Return in how many samples solves have failed so far, as `guard` counted them.

    Args:
        module: the model; all its equilibria are counted together.

    Returns:
        The numbers of "forward" and "adjoint" failures.
    """
    memories = _module(module).modules()
    counts = [memory.failures for memory in memories if isinstance(memory, Memory)]
    return {kind: sum(count[kind] for count in counts) for kind in ("forward", "adjoint")}


def _module(module: Any) -> nn.Module:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module={module!r:.60}; expected a torch.nn.Module")
    return module


def _whole(step: Any) -> bool:
    return not isinstance(step, bool) and isinstance(step, int) and step >= 0
