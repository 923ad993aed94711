"""Equilibria in evaluation mode: whether they attach a gradient, and a warning if one is lost.

By default an equilibrium attaches no gradient in evaluation mode. If parameters or inputs of F
require grad there, users may expect a gradient that they do not get. Then a warning says so, once
for each equilibrium.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .._plumbing.compilation import as_written, never_compiled
from .._plumbing.once import warn
from .._plumbing.trial import Trial
from ..contract.errors import AssumptionWarning
from ..contract.state import State, flatten

IN_EVAL = (
    "an equilibrium in evaluation mode returns its state without a gradient, although parameters "
    "or inputs of F require grad: F and all layers before the equilibrium get no gradient. To "
    "train, call model.train(). For a gradient in evaluation mode (forces, saliency, attacks) pass "
    "grad_in_eval=True where the model is made, or call dpp.set_grad(model, spec, in_eval=True). "
    "If you want no gradient, evaluate under torch.no_grad(). This is said once per equilibrium."
)

_SAID = "_said_of_eval"


def attaches(module: nn.Module) -> bool:
    """Whether an equilibrium attaches a gradient: in training mode, or with `grad_in_eval`."""
    in_eval: bool = getattr(module, "grad_in_eval", False)
    return torch.is_grad_enabled() and (module.training or in_eval)


def watched(module: nn.Module, func: Callable[..., Any]) -> Callable[..., Any]:
    """Return F for a solve whose result gets no gradient; F warns if one may be expected.

    The first evaluation looks whether F computes with tensors that require grad. If so, a warning
    is given, once for each equilibrium. The solve makes the same evaluations, with the same
    results. If the equilibrium attaches a gradient, under `torch.no_grad` and in trials, nothing is
    looked at.

    Args:
        module: the equilibrium. It remembers that the warning was given.
        func: F, on a state or on its leaves one by one.
    """
    if not torch.is_grad_enabled() or attaches(module) or getattr(module, _SAID, False):
        return func
    if torch.compiler.is_compiling() and getattr(torch.compiler, "is_exporting", bool)():
        return func  # an exported program must not contain the warning
    first = [True]

    def evaluate(*state: State) -> Any:
        if not first:
            return func(*state)
        first.clear()
        return _look(module, func, state)

    evaluate.__wrapped__ = func  # type: ignore[attr-defined]
    return evaluate


def look(module: nn.Module, func: Callable[[State], State], state: State) -> None:
    """Do what `watched` does, for a solve that is not ours: evaluate F once more, and warn.

    After the warning F is not evaluated here any more.

    Args:
        module: the equilibrium.
        func: F.
        state: a state at which F can be evaluated.
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
    # Inside the trial of a report or of an outer equilibrium there is no warning.
    if Trial.depth() > own_trial:
        return func(*state)
    with _Look(flatten(state)[0]) as looking:
        image = as_written(func)(*state)
    if looking.found:
        setattr(module, _SAID, True)
        warn(IN_EVAL, AssumptionWarning)
    return image


class _Look(TorchFunctionMode):
    """Notices whether an operation has an input that requires grad.

    Parameters and other leaves of autograd's graph require grad under `torch.no_grad` as well.

    Args:
        state: the leaves of F's argument, which do not count.

    Attributes:
        found: whether there was such an input.
    """

    def __init__(self, state: Iterable[Tensor]) -> None:
        super().__init__()
        self.found = False
        self._state = {id(leaf) for leaf in state}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # `__get__` reads an attribute, such as a shape or a dtype, and computes nothing.
        if not self.found and getattr(func, "__name__", "") != "__get__":
            self.found = any(
                isinstance(leaf, Tensor) and leaf.requires_grad and id(leaf) not in self._state
                for leaf in tree_leaves((args, kwargs))
            )
        return func(*args, **kwargs)
