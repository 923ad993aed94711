"""Switch, step and ask every equilibrium inside a model."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from ._plumbing.once import warn, warn_once
from .contract.errors import AssumptionWarning
from .contract.memory import LARGEST_STEP, Memory
from .hosts import find_equilibria, what_is_found
from .strategies.arguments import boolean, positive_int
from .strategies.registry import Spec, get_strategy

# Models without anything to tell the step to, of which that was said; `set_step` is called often.
_said: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def set_grad(module: nn.Module, spec: Spec | list[Spec], *, in_eval: bool | None = None) -> int:
    """Switch every equilibrium inside a model to another strategy, in place, mid-training.

    Args:
        module: the model. Its equilibria are found through the installed hosts.
        spec: the new strategy, see `get_strategy`; or whatever else the host takes as `grad`.
        in_eval: whether the equilibria attach in evaluation mode too, for forces, saliency maps and
            attacks. None leaves that as it is.

    Returns:
        The number of equilibria that were switched; 0 if the model has none.

    Warns:
        UserWarning: if the model has no equilibrium. It says what would be found.
        AssumptionWarning: once for each framework that is not enabled, if its equilibria keep their
            own gradient until then. The spec is noted all the same, and acts from then on.

    Raises:
        ValueError: if the spec is invalid, or if `in_eval` asks for what a host cannot do. Then
            nothing is switched.
        TypeError: if `module` is no `torch.nn.Module`.
    """
    found = find_equilibria(check_module(module))
    if not found:
        if isinstance(spec, str):
            get_strategy(spec)  # a name that nobody knows is no less wrong
        warn(f"set_grad: {what_is_found(module)} Its gradient stays as it was.")
    switches = [host.prepare_grad(equilibrium, spec) for host, equilibrium in found]
    if in_eval is not None:
        boolean("in_eval", in_eval)
        switches += [host.prepare_in_eval(equilibrium, in_eval) for host, equilibrium in found]
    for switch in switches:
        switch()
    for host in {host.name: host for host, _ in found}.values():
        if not (host.is_enabled or host.acts_disabled(spec)):
            warn_once(
                f"{host.name} is not enabled",
                f"set_grad: the host {host.name} is not enabled, so {spec!r} does not act, and "
                f"training goes on with the gradient of the framework itself. Call dpp.enable("
                f'"{host.name}"): the gradient is noted, and acts from then on. This is said once.',
                AssumptionWarning,
            )
    return len(found)


def set_step(module: nn.Module, step: int, *, total: int | None = None) -> None:
    """Tell every equilibrium inside a model the training step (optimiser steps, from 0).

    Args:
        module: the whole model. Equilibria are numbered in this module, and random depths are drawn
            by these numbers.
        step: the step to which the next forward pass belongs.
        total: the length of training in steps, for schedules by fractions of training. It is kept
            until another one is told.

    Warns:
        UserWarning: once for a model that has neither an equilibrium nor a `Memory`. It says what
            would be found.
        AssumptionWarning: once, if `step` is beyond the length of training.

    Raises:
        ValueError: if `step` is not a whole number of at least 0, or too large for a float64; if
            `total` is not a whole number of at least 1.
    """
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= LARGEST_STEP:
        raise ValueError(f"step={step!r:.60}; expected a whole number of at least 0, at most 2**53")
    if total is not None:
        total = positive_int("total", total)
    memories = [m for m in check_module(module).modules() if isinstance(m, Memory)]
    for place, memory in enumerate(memories):
        memory.tell(int(step), total, place)
    length = max((memory.total or step for memory in memories), default=step)
    if step > length:
        warn_once(
            "beyond the total",
            f"step={step} is beyond total={length}: what goes by fractions of training has been at "
            "its end since then. Count optimiser steps in both numbers. This is said once.",
            AssumptionWarning,
        )
    if not memories and module not in _said:
        _said.add(module)
        if not find_equilibria(module):  # TorchDEQ's own gradients need no step
            warn(f"set_step: {what_is_found(module)}")


def failures(module: nn.Module) -> dict[str, int]:
    """Return in how many samples solves have failed so far, as `guard` counted them.

    Args:
        module: the model. All its equilibria are counted together.

    Returns:
        The numbers of "forward" and "adjoint" failures.

    Warns:
        UserWarning: if the model has neither an equilibrium nor a `Memory`. It says what would be
            found.
    """
    memories = check_module(module).modules()
    counts = [memory.failures for memory in memories if isinstance(memory, Memory)]
    if not counts and not find_equilibria(module):
        warn(f"failures: {what_is_found(module)} So nothing has counted.")
    return {kind: sum(count[kind] for count in counts) for kind in ("forward", "adjoint")}


def check_module(module: Any) -> nn.Module:
    """Return `module` if it is a `torch.nn.Module`.

    Raises:
        TypeError: if it is none.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module={module!r:.60}; expected a torch.nn.Module")
    return module
