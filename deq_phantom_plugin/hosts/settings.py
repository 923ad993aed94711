"""Settings of a foreign module under our argument names, and the memory that we keep on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import SequenceMatcher
from typing import Any

from torch import nn

from .._plumbing.once import warn_once
from ..contract.errors import AssumptionWarning
from ..contract.memory import Memory
from ..contract.strategy import GradStrategy
from ..strategies.registry import get_strategy
from ..strategies.shine import no_estimate


def defaults(
    setting: Callable[[str, Any], Any],
    arguments: Mapping[str, tuple[str, Any]],
    solvers: Mapping[str, str],
) -> dict[str, Any]:
    """Return a framework's settings of its backward pass, as defaults for arguments of a spec.

    Args:
        setting: looks up a setting by its name, with a default: (name, default) -> value.
        arguments: maps the name of each setting to our argument, and to the framework's default. A
            setting with its default value is left out, since nobody may have asked for it.
        solvers: maps the framework's names of solvers to ours, where they differ.
    """
    found = {}
    for name, (argument, says_nothing) in arguments.items():
        value = setting(name, says_nothing)
        if value != says_nothing:
            found[argument] = solvers.get(str(value), value) if argument == "solver" else value
    return found


def fitting(strategy: GradStrategy, solve: str) -> GradStrategy:
    """Return a strategy, unless it needs what a solve does not have.

    Args:
        strategy: the strategy.
        solve: a forward solve that makes no estimate of the inverse Jacobian, in words.

    Raises:
        ValueError: if the strategy needs such an estimate at any step.
    """
    if strategy.needs_inverse_jacobian:
        raise no_estimate(strategy, solve)
    return strategy


def memory_of(module: Any) -> Memory:
    """Return the `grad_memory` of a module; make one if the module has none."""
    if not hasattr(module, "grad_memory"):
        module.grad_memory = Memory()
    memory: Memory = module.grad_memory
    return memory


def remember_each(module: Any, n: int) -> None:
    """Give a module with n equilibria a `grad_memory` with one memory each, if it has none yet."""
    if not hasattr(module, "grad_memory"):
        module.grad_memory = nn.ModuleList(Memory() for _ in range(n))


def say_not_saved(spec: Any, saved: Any) -> None:
    """Warn once that a config cannot name a gradient that is a function.

    Args:
        spec: the gradient.
        saved: what the config names in its place; None for the model's own gradient.
    """
    warn_once(
        "grad is not saved",
        f"the gradient in force, {spec!r}, is a function, which a config cannot name. So a model "
        f"that is loaded from a checkpoint has another one: config.grad={saved!r}. Call "
        "dpp.set_grad after loading, or give the function a name by dpp.register_strategy. This is "
        "said once.",
        AssumptionWarning,
    )


def say_misspelt(settings: Mapping[str, Any], framework: str) -> None:
    """Warn once of a setting that is meant for `grad`, and that its framework passes over.

    Frameworks that take settings of any name do not refuse `gard="upg"`. They compute their own
    gradient instead.

    Args:
        settings: the settings of an equilibrium whose `grad` is not named.
        framework: the name of the framework, for the message.
    """
    for name, value in settings.items():
        if isinstance(name, str) and name != "grad" and _is_meant(name.lower(), value):
            warn_once(
                f"misspelt {name}",
                f"{framework} knows no setting {name}={value!r} and passes it over, so the "
                f"gradient is its own. If you mean the gradient of deq-phantom-plugin, write "
                f"grad={value!r}. This is said once.",
                AssumptionWarning,
            )


def _is_meant(name: str, value: Any) -> bool:
    """Whether a setting's name resembles `grad`, and its value names one or several strategies."""
    # With these values there are other settings: grad_clip="auto", grade="exact".
    if isinstance(value, str) and value in ("auto", "exact"):  # an array would compare each element
        return sorted(name) == sorted("grad")
    alike = "grad" in name or SequenceMatcher(None, name, "grad").ratio() > 0.7
    values = value if isinstance(value, list | tuple) and value else [value]
    return alike and all(map(_is_spec, values))


def _is_spec(value: Any) -> bool:
    """Whether a value names a strategy."""
    if isinstance(value, GradStrategy):
        return True
    try:
        return isinstance(value, str) and get_strategy(value) is not None
    except ValueError:
        return False
