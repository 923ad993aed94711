"""Equilibria in evaluation mode: whether they attach a gradient, and a word where one is lost."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .._plumbing.compilation import as_written, never_compiled
from .._plumbing.trial import Trial
from ..contract.errors import AssumptionWarning
from ..contract.state import State, flatten

IN_EVAL = (
    "an equilibrium in evaluation mode returns its state without a gradient, while parameters or "
    "inputs of F require grad: what lies before it, F included, gets none. Call model.train() to "
    "train. For a gradient in evaluation mode (forces, saliency, attacks) pass grad_in_eval=True "
    "where the model is made, or dpp.set_grad(model, spec, in_eval=True). Where none is wanted, "
    "evaluate under torch.no_grad(). This is said once per equilibrium."
)

_SAID = "_said_of_eval"


def attaches(module: nn.Module) -> bool:
    """Whether an equilibrium attaches a gradient: in training, in evaluation if it is told to."""
    in_eval: bool = getattr(module, "grad_in_eval", False)
    return torch.is_grad_enabled() and (module.training or in_eval)


def watched(module: nn.Module, func: Callable[..., Any]) -> Callable[..., Any]:
    """Return F for a solve that may go without a gradient where one is expected.

    Its first evaluation looks at what F is made of; a warning says once for each equilibrium that
    the gradient ends there. No evaluation is added and none computes anything else. Nothing is
    looked at where the equilibrium attaches, under `torch.no_grad`, and in trials.

    Args:
        module: the equilibrium, which keeps that it was said.
        func: F, on a state or on its leaves one by one.
    """
    if not torch.is_grad_enabled() or attaches(module) or getattr(module, _SAID, False):
        return func
    if torch.compiler.is_compiling() and getattr(torch.compiler, "is_exporting", bool)():
        return func  # no program is to say anything
    first = [True]

    def evaluate(*state: State) -> Any:
        if not first:
            return func(*state)
        first.clear()
        return _look(module, func, state)

    evaluate.__wrapped__ = func  # type: ignore[attr-defined]
    return evaluate


def look(module: nn.Module, func: Callable[[State], State], state: State) -> None:
    """Do what `watched` does where the solve is another's: evaluates F, until there was a warning.

    Args:
        module: the equilibrium.
        func: F.
        state: a state to evaluate it at.
    """
    if watched(module, func) is not func:
        _look_once(module, func, state)


@never_compiled
def _look_once(module: nn.Module, func: Callable[[State], State], state: State) -> None:
    if Trial.depth():
        return
    with torch.no_grad(), Trial(state):
        _look(module, func, (state,), own_trial=True)


@never_compiled
def _look(
    module: nn.Module, func: Callable[..., Any], state: tuple[State, ...], own_trial: bool = False
) -> Any:
    if Trial.depth() > own_trial:  # of a report, or of an equilibrium that this one is inside of
        return func(*state)
    with _Look(flatten(state)[0]) as looking:
        image = as_written(func)(*state)
    if looking.found:
        setattr(module, _SAID, True)
        warnings.warn(IN_EVAL, AssumptionWarning, stacklevel=2)
    return image


class _Look(TorchFunctionMode):
    """Notices whether an operation has an input that requires grad: leaves do without autograd too.

    Args:
        state: the leaves of F's argument, which are not meant.

    Attributes:
        found: whether there was one.
    """

    def __init__(self, state: Iterable[Tensor]) -> None:
        super().__init__()
        self.found = False
        self._state = {id(leaf) for leaf in state}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # To read a shape or a dtype is not to compute.
        if not self.found and getattr(func, "__name__", "") != "__get__":
            self.found = any(
                isinstance(leaf, Tensor) and leaf.requires_grad and id(leaf) not in self._state
                for leaf in tree_leaves((args, kwargs))
            )
        return func(*args, **kwargs)
