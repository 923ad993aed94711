"""Finds the equilibria inside a model, and runs the model once to see what they solve.

Hosts know which modules are equilibria, and let observers see each solve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..._plumbing.inference import refuse_in_inference_mode
from ..._plumbing.trial import Trial
from ...contract.memory import Memory
from ...contract.state import flatten
from ...hosts import Host, find_equilibria, what_is_found
from ...hosts.solve import Solve
from .problem import check_scalar


def named_equilibria(model: nn.Module) -> list[tuple[str, Host, nn.Module]]:
    """Return every equilibrium inside a model, as (name in the model, host, module).

    In a compiled model the names are those of the model that was compiled.

    Raises:
        ValueError: if there is none.
    """
    names = {m: name.replace("_orig_mod.", "") for name, m in model.named_modules()}
    found = find_equilibria(model)
    if not found:
        raise ValueError(
            f"{what_is_found(model)} To measure at a state that you have solved for yourself, call "
            "dpp.gradient_report(func, equilibrium, loss, params)"
        )
    return [(names[module] or "equilibrium", host, module) for host, module in found]


def solved(
    model: nn.Module,
    equilibria: Sequence[tuple[str, Host, nn.Module]],
    inputs: Any,
    loss: Callable[[Any], Tensor],
) -> tuple[Tensor, list[tuple[str, Solve, list[Tensor] | None]]]:
    """Run a model once, and return the loss and all solves.

    Args:
        model: the model.
        equilibria: what `named_equilibria` returned for it.
        inputs: the inputs: a tensor; a tuple or list of positional arguments; or a mapping of
            keyword arguments.
        loss: a function from what the model returns to a scalar.

    Returns:
        The loss; and in the order of the solves (name, solve, dL/dh), with one tensor per leaf of
        the state. dL/dh is None where the loss does not depend on the solve.

    Raises:
        ValueError: if the model refuses the inputs, or the loss is not a scalar that depends on
            any of the solves.
        RuntimeError: in inference mode.
    """
    refuse_in_inference_mode("a measurement of gradients")
    solves: list[tuple[str, Solve]] = []
    ends = [
        host.observe(module, partial(_collect, solves, name)) for name, host, module in equilibria
    ]
    try:
        output = _call(model, inputs)
    finally:
        for end in ends:
            end()
    value = check_scalar(loss(output))
    cotangents = _cotangents(value, solves)
    return value, [(*solve, v) for solve, v in zip(solves, cotangents, strict=True)]


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Put a model in training mode inside a `with` block, and restore it at the end.

    Modes, buffers, memories and random state are restored.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    memories = [(m, m.step, m.kept()) for m in model.modules() if isinstance(m, Memory)]
    with Trial([*model.parameters()]):
        if not model.training:
            model.train()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            with torch.no_grad():
                for buffer, saved in buffers:
                    buffer.copy_(saved)
            for memory, step, kept in memories:
                memory.step = step
                memory.restore(kept)


def _collect(solves: list[tuple[str, Solve]], name: str, solve: Solve) -> None:
    """Add a solve; from an equilibrium's second solve on, its name gets a number."""
    number = 1 + sum(known.partition(" #")[0] == name for known, _ in solves)
    solves.append((name if number == 1 else f"{name} #{number}", solve))


def _call(model: nn.Module, inputs: Any) -> Any:
    """Call a model on its inputs.

    Raises:
        ValueError: if it raises anything; names the shapes of the inputs.
    """
    try:
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)
    except Exception as error:
        leaves = flatten(dict(inputs) if isinstance(inputs, Mapping) else inputs)[0]
        shapes = ", ".join(
            str(tuple(leaf.shape)) if isinstance(leaf, Tensor) else type(leaf).__name__
            for leaf in leaves
        )
        raise ValueError(
            f"{type(model).__name__} refused its inputs ({shapes}): {type(error).__name__}: {error}"
        ) from error


def _cotangents(loss: Tensor, solves: list[tuple[str, Solve]]) -> list[list[Tensor] | None]:
    """Return dL/dh for each solve, None where the loss does not depend on the solve.

    Raises:
        ValueError: if the loss depends on none of the solves.
    """
    states = [flatten(solve.attached)[0] for _, solve in solves]
    leaves = [leaf for state in states for leaf in state]
    grads: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if leaves and loss.requires_grad:
        grads = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
    if all(grad is None for grad in grads):
        raise ValueError(
            f"the loss depends on none of the {len(solves)} equilibria that the model solved, so "
            "there is no gradient to measure; compute the loss from the output of this call"
        )
    found: list[list[Tensor] | None] = []
    remaining = iter(zip(grads, leaves, strict=True))
    for state in states:
        own = [next(remaining) for _ in state]
        known = any(grad is not None for grad, _ in own)
        filled = [torch.zeros_like(x) if grad is None else grad for grad, x in own]
        found.append(filled if known else None)
    return found
