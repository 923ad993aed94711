"""What a patched model calls in place of its own backward pass."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ..contract.memory import Memory
from ..contract.state import State
from ..contract.strategy import BatchDim, Context, GradStrategy
from ..hosts import find_equilibria
from ..hosts.attaching import Attaching
from ..hosts.evaluation import attaches, look
from ..hosts.solve import tell
from ..strategies.registry import Spec, get_strategy
from ..switch import set_grad, set_step

RUN_GRAD = "DEQ_PHANTOM_RUN_GRAD"
"""The environment variable in which `deq-phantom run` has its spec."""


class Equilibrium(Attaching):
    """The gradient of one equilibrium that a patched model solves itself, by name.

    A module without parameters, so that `dpp.set_grad` and `dpp.set_step` find it in the model.
    It adds one number to the model's `state_dict`, the step of its memory, the same all through
    training. Checkpoints without it load; a model without the patch refuses one that has it, where
    it loads strictly.

    Args:
        grad: the strategy's spec, see `get_strategy`; None for the model's own gradient, where that
            is still there.
        batch_dim: see `Context.batch_dim`.
        grad_in_eval: whether it attaches in evaluation mode too, where the model calls it there.
        own: a spec of what the model does by itself, for reports and monitors; None where the patch
            has taken that away.

    Attributes:
        grad: the strategy.
        memory: see `Memory`.

    Raises:
        ValueError: if the spec is invalid, or is None beside `own=None`.
    """

    _models_own: GradStrategy | None

    def __init__(
        self,
        grad: Spec | None,
        batch_dim: BatchDim = "auto",
        grad_in_eval: bool = False,
        own: Spec | None = None,
    ) -> None:
        self.__dict__["_models_own"] = None if own is None else get_strategy(own)
        super().__init__(grad, batch_dim, grad_in_eval)  # type: ignore[arg-type]

    @property
    def is_own(self) -> bool:
        """Whether no gradient is named."""
        return self.grad is self._models_own

    def strategy_of(self, spec: Spec | None) -> GradStrategy:
        """Return the strategy that a spec names here, the model's own for None."""
        if spec is not None:
            return super().strategy_of(spec)
        if self._models_own is None:
            raise ValueError(
                "grad=None; expected a spec such as 'npg': the patch replaced the repository's own "
                "gradient. `deq-phantom patch --revert` brings that back"
            )
        return self._models_own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"_models_own": None, **state})  # pickles from before it lack it

    def forward(
        self,
        func: Callable[[State], State],
        equilibrium: State,
        start: State | None = None,
        step: int | None = None,
        own: Callable[[], State] | None = None,
    ) -> State:
        """Return the equilibrium attached to autograd, in evaluation mode as it was given.

        Args:
            func: F, from a state to a state like the equilibrium.
            equilibrium: h* as the model's own solver found it, a tensor or a nesting of tensors.
            start: where that solve began; zeros if None. A strategy that owns the solve begins
                there; the model's own solve, which has run by then, is lost on it.
            step: the training step, None or negative where it is not known.
            own: returns the equilibrium with the model's own gradient: called, in evaluation mode
                too, while no other is named.
        """
        equilibrium = tree_map(torch.Tensor.detach, equilibrium)
        by_itself = own if self.is_own else None
        if by_itself is None and not attaches(self):
            look(self, func, equilibrium)
            return equilibrium
        if start is None:
            start = tree_map(torch.zeros_like, equilibrium)
        context = self.context(start, None if step is None or step < 0 else int(step))
        if by_itself is None:
            return self.attached(func, equilibrium, context, 0)
        found = by_itself()
        if torch.is_grad_enabled():
            tell(self._watching(), func, equilibrium, found, self.grad, context, 0)
        return found


def grad_argument(text: str) -> str:
    """Check a spec on a command line; a `type` for argparse.

    Raises:
        argparse.ArgumentTypeError: if it is invalid; says what is accepted.
    """
    try:
        get_strategy(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def switch(model: nn.Module, grad: Spec | None) -> None:
    """Switch a patched model; under `deq-phantom run` to that command's method.

    Args:
        model: the model.
        grad: the method, None for the model's own gradient where the patch has left it.

    Raises:
        ValueError: if the model has no equilibrium, since a part of the patch is missing then; or
            the spec is invalid.
    """
    _check_patched(model)
    set_grad(model, os.environ.get(RUN_GRAD, grad))  # type: ignore[arg-type]  # None is one here


def tell_step(model: nn.Module, step: int, grad: Spec | None, total: int | None = None) -> None:
    """Tell a patched model the training step, see `dpp.set_step`.

    Args:
        model: the model; one that the patch knows nothing of needs none.
        step: the step.
        grad: what the configuration says, None for the model's own gradient.
        total: how many steps there will be, None where that is not known.

    Raises:
        ValueError: if a method is named and the model has no equilibrium, since a part of the patch
            is missing then.
    """
    if grad is not None:
        _check_patched(model)
    if find_equilibria(model):
        set_step(model, step, total=total)


def _check_patched(model: nn.Module) -> None:
    if not find_equilibria(model):
        raise ValueError(
            f"{type(model).__name__} has no equilibrium whose gradient could be switched: a file "
            "of the patched repository is missing or was put back. `deq-phantom doctor` says which"
        )


def default_grad(parser: argparse.ArgumentParser, grad: Spec) -> None:
    """Make a spec the default of TorchDEQ's `--grad`; its own `--ift` alone still means itself."""
    default = [grad]
    parser.set_defaults(grad=default)

    class Own(argparse._StoreTrueAction):
        def __call__(
            self, parser: Any, namespace: Any, values: Any, option_string: Any = None
        ) -> None:
            super().__call__(parser, namespace, values, option_string)
            if namespace.grad is default:
                namespace.grad = [1]

    for option in ("--ift", "--hook_ift"):
        parser._option_string_actions[option].__class__ = Own


def steps(grad: int | Spec) -> int:
    """Return the steps k of a strategy, 1 where it has none; an integer is itself.

    For scripts that compute with the integer that `grad` was before, in evaluation: of what is
    drawn that is the mean, of what follows the step (a ramp, a schedule) the first.

    Raises:
        ValueError: if k is all of a loop, which has no number.
    """
    if isinstance(grad, int):
        return grad
    acting = get_strategy(grad).resolve(Context(memory=Memory().eval(), step=0, total=1))
    k = getattr(getattr(acting, "grad", acting), "k", 1)  # of a guard, that inside
    if isinstance(k, str):
        raise ValueError(
            f"k={k!r} of {acting!r}: the script needs a number of steps here; expected a number"
        )
    return int(k)
