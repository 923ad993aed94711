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
from .._plumbing.transforms import carries_tangent, in_forward_mode
from .._plumbing.trial import Trial
from ..contract.errors import AssumptionWarning
from ..contract.state import State, flatten

IN_EVAL = (
    "an equilibrium in evaluation mode returns its state without a gradient, although parameters "
    "or inputs of F require grad (or carry a tangent of forward mode): F and all layers before the "
    "equilibrium get no gradient. To "
    "train, call model.train(). For a gradient in evaluation mode (forces, saliency, attacks) pass "
    "grad_in_eval=True where the model is made, or call dpp.set_grad(model, spec, in_eval=True). "
    "If you want no gradient, evaluate under torch.no_grad(). This is said once per equilibrium."
)

_SAID = "_said_of_eval"


def attaches(module: nn.Module) -> bool:
    """Whether an equilibrium attaches a gradient: in training mode, or with `grad_in_eval`.

    In forward mode it does so under `torch.no_grad` too, which does not switch tangents off.
    """
    in_eval: bool = getattr(module, "grad_in_eval", False)
    return _differentiated() and (module.training or in_eval)


def _differentiated() -> bool:
    return torch.is_grad_enabled() or in_forward_mode()


def watched(module: nn.Module, func: Callable[..., Any]) -> Callable[..., Any]:
    """Return F for a solve whose result gets no gradient; F warns if one may be expected.

    The first evaluation looks whether F computes with tensors that require grad, or that carry a
    tangent of forward mode. If so, a warning is given, once for each equilibrium. The solve makes
    the same evaluations, with the same results. If the equilibrium attaches a gradient, under
    `torch.no_grad` and in trials, nothing is looked at.

    Args:
        module: the equilibrium. It remembers that the warning was given.
        func: F, on a state or on its leaves one by one.
    """
    if not _differentiated() or attaches(module) or getattr(module, _SAID, False):
        return func
    if torch.compiler.is_compiling() and getattr(torch.compiler, "is_exporting", bool)():
        return func  # an exported program must not contain the warning
    first, backward = [True], torch.is_grad_enabled()  # the solve itself runs without autograd

    def evaluate(*state: State) -> Any:
        if not first:
            return func(*state)
        first.clear()
        return _look(module, func, state, backward)

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
        _look_once(module, func, state, torch.is_grad_enabled())


@never_compiled
def _look_once(
    module: nn.Module, func: Callable[[State], State], state: State, backward: bool
) -> None:
    if Trial.depth():
        return
    with torch.no_grad(), Trial(state):
        _look(module, func, (state,), backward, own_trial=True)


@never_compiled
def _look(
    module: nn.Module,
    func: Callable[..., Any],
    state: tuple[State, ...],
    backward: bool,
    own_trial: bool = False,
) -> Any:
    # Inside the trial of a report or of an outer equilibrium there is no warning.
    if Trial.depth() > own_trial:
        return func(*state)
    with _Look(flatten(state)[0], backward) as looking:
        image = as_written(func)(*state)
    if looking.found:
        setattr(module, _SAID, True)
        warn(IN_EVAL, AssumptionWarning)
    return image


class _Look(TorchFunctionMode):
    """Notices whether an operation has an input that is differentiated.

    Parameters and other leaves of autograd's graph require grad under `torch.no_grad` as well.

    Args:
        state: the leaves of F's argument, which do not count.
        backward: whether tensors that require grad count. A tangent of forward mode always does.

    Attributes:
        found: whether there was such an input.
    """

    def __init__(self, state: Iterable[Tensor], backward: bool) -> None:
        super().__init__()
        self.found = False
        self._backward = backward
        self._state = {id(leaf) for leaf in state}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # `__get__` reads an attribute, such as a shape or a dtype, and computes nothing.
        if not self.found and getattr(func, "__name__", "") != "__get__":
            self.found = any(
                isinstance(leaf, Tensor)
                and id(leaf) not in self._state
                and ((leaf.requires_grad and self._backward) or carries_tangent([leaf]))
                for leaf in tree_leaves((args, kwargs))
            )
        return func(*args, **kwargs)
