"""Switch, step and ask every equilibrium inside a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from .hosts import find_equilibria
from .memory import LARGEST_STEP, Memory
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
    found = find_equilibria(check_module(module))
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
        ValueError: if `step` is not a whole number of at least 0, or too large for a float64.
    """
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= LARGEST_STEP:
        raise ValueError(f"step={step!r:.60}; expected a whole number of at least 0, at most 2**53")
    for memory in check_module(module).modules():
        if isinstance(memory, Memory):
            memory.step = int(step)


def failures(module: nn.Module) -> dict[str, int]:
    """Return in how many samples solves have failed so far, as `guard` counted them.

    Args:
        module: the model; all its equilibria are counted together.

    Returns:
        The numbers of "forward" and "adjoint" failures.
    """
    memories = check_module(module).modules()
    counts = [memory.failures for memory in memories if isinstance(memory, Memory)]
    return {kind: sum(count[kind] for count in counts) for kind in ("forward", "adjoint")}


def check_module(module: Any) -> nn.Module:
    """Return what is a `torch.nn.Module`.

    Raises:
        TypeError: if it is none.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module={module!r:.60}; expected a torch.nn.Module")
    return module
