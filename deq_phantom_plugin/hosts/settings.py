"""Settings of a foreign module: its framework's own under our names, and what we keep on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..contract.memory import Memory


def defaults(
    setting: Callable[[str, Any], Any],
    arguments: Mapping[str, tuple[str, Any]],
    solvers: Mapping[str, str],
) -> dict[str, Any]:
    """Return what a framework says of its own backward pass, as arguments that a spec may lack.

    Args:
        setting: looks up a setting by name, with a default.
        arguments: setting -> our argument, and the value at which it says nothing: the
            framework's default, which is there whether anybody asked for it or not.
        solvers: the framework's name of a solver -> ours, where they differ.
    """
    found = {}
    for name, (argument, says_nothing) in arguments.items():
        value = setting(name, says_nothing)
        if value != says_nothing:
            found[argument] = solvers.get(str(value), value) if argument == "solver" else value
    return found


def memory_of(module: Any) -> Memory:
    """Return the `grad_memory` of a module, made if it has none."""
    if not hasattr(module, "grad_memory"):
        module.grad_memory = Memory()
    memory: Memory = module.grad_memory
    return memory


def remember_each(module: Any, n: int) -> None:
    """Give a module that finds n equilibria a memory for each as `grad_memory`, if it has none."""
    if not hasattr(module, "grad_memory"):
        module.grad_memory = nn.ModuleList(Memory() for _ in range(n))
