"""What patched code calls in place of a model's own backward pass.

`Equilibrium` is the module that a patch puts into a model; it attaches the gradient of a strategy
to an equilibrium that the model has solved itself. The functions beside it serve patched scripts:
they parse a spec, switch the gradient of a model, and tell the model the training step.
"""

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
from ..hosts.settings import fitting
from ..hosts.solve import tell
from ..strategies.registry import Spec, get_strategy
from ..switch import set_grad, set_step

RUN_GRAD = "DEQ_PHANTOM_RUN_GRAD"
"""The environment variable by which `deq-phantom run` passes its spec to the processes."""


class Equilibrium(Attaching):
    """Attaches a gradient, chosen by name, to an equilibrium that a patched model solves itself.

    It is a module without parameters, so `dpp.set_grad` and `dpp.set_step` find it in the model.
    It adds one number to the model's `state_dict`: the step of its memory. A patched model loads
    checkpoints that do not have this number. A model without the patch refuses a checkpoint that
    has it, if it loads strictly.

    Args:
        grad: the spec of the strategy, see `get_strategy`. None selects the model's own gradient,
            if the patch has kept it.
        batch_dim: see `Context.batch_dim`.
        grad_in_eval: whether the gradient is attached in evaluation mode too, if the model calls
            this module there.
        own: a spec that describes the model's own gradient, for reports and monitors. None if the
            patch has removed that gradient.

    Attributes:
        grad: the strategy.
        memory: see `Memory`.

    Raises:
        ValueError: if the spec is invalid, or if `grad` and `own` are both None.
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
        """Return the strategy that a spec names here, or the model's own if the spec is None."""
        if spec is not None:
            return fitting(super().strategy_of(spec), "the solve of a patched repository")
        if self._models_own is None:
            raise ValueError(
                "grad=None; expected a spec such as 'npg'. The patch has replaced the repository's "
                "own gradient; `deq-phantom patch --revert` restores it"
            )
        return self._models_own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"_models_own": None, **state})  # older pickles do not have it

    def forward(
        self,
        func: Callable[[State], State],
        equilibrium: State,
        start: State | None = None,
        step: int | None = None,
        own: Callable[[], State] | None = None,
    ) -> State:
        """Return the equilibrium attached to autograd; in evaluation mode, without a graph.

        Args:
            func: F, from a state to a state of the same structure.
            equilibrium: h* as the model's own solver found it, a tensor or a nesting of tensors.
            start: the state from which that solve began; zeros if None. A strategy that owns the
                solve begins at `start` again, and does not use the result of the model's solve.
            step: the training step; None or negative if it is not known.
            own: returns the equilibrium with the model's own gradient. It is called, in evaluation
                mode too, as long as no other gradient is named.
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
    """Check a spec on a command line, and return it; use this as a `type` of argparse.

    Args:
        text: the spec.

    Raises:
        argparse.ArgumentTypeError: if the spec is invalid; the message says what is accepted.
    """
    try:
        get_strategy(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def switch(model: nn.Module, grad: Spec | None) -> None:
    """Switch the gradient of a patched model.

    Under `deq-phantom run`, the spec of that command takes precedence over `grad`.

    Args:
        model: the model.
        grad: the spec; None for the model's own gradient, if the patch has kept it.

    Raises:
        ValueError: if the model has no equilibrium, which means that a part of the patch is
            missing; or if the spec is invalid.
    """
    _check_patched(model)
    set_grad(model, os.environ.get(RUN_GRAD, grad))  # type: ignore[arg-type]  # None is one here


def tell_step(model: nn.Module, step: int, grad: Spec | None, total: int | None = None) -> None:
    """Tell a patched model the training step, see `dpp.set_step`.

    A model without an equilibrium is left alone if `grad` is None: the patch does not cover it.

    Args:
        model: the model.
        step: the training step.
        grad: the spec in the configuration, None for the model's own gradient.
        total: the number of training steps, None if it is not known.

    Raises:
        ValueError: if a gradient is named and the model has no equilibrium, which means that a part
            of the patch is missing.
    """
    if grad is not None:
        _check_patched(model)
    if find_equilibria(model):
        set_step(model, step, total=total)


def _check_patched(model: nn.Module) -> None:
    if not find_equilibria(model):
        raise ValueError(
            f"{type(model).__name__} has no equilibrium whose gradient could be switched. A file "
            "of the patched repository is missing, or was restored to its original. Run "
            "`deq-phantom doctor` in the repository: it names the file"
        )


def default_grad(parser: argparse.ArgumentParser, grad: Spec) -> None:
    """Make a spec the default of TorchDEQ's option `--grad`.

    A user may give `--ift` or `--hook_ift` without `--grad`. The new default must not override that
    choice, so these two options then set `grad` to [1], TorchDEQ's own default.

    Args:
        parser: a parser to which TorchDEQ has added its options.
        grad: the spec.
    """
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
    """Return the number of steps k of a strategy, or 1 if it has no k.

    TorchDEQ's `grad` is an integer, and some scripts compute with it. They call this function once
    `grad` may be a spec. If a strategy draws k, the result is its mean. If k follows the training
    step, as in a ramp or a schedule, the result is the value at step 0.

    Args:
        grad: a spec, or an integer, which is returned as it is.

    Raises:
        ValueError: if k is not a number, as in `tbptt(k='all')`.
    """
    if isinstance(grad, int):
        return grad
    acting = get_strategy(grad).resolve(Context(memory=Memory().eval(), step=0, total=1))
    k = getattr(getattr(acting, "grad", acting), "k", 1)  # a guard has its strategy in `grad`
    if isinstance(k, str):
        raise ValueError(
            f"k={k!r} of {acting!r}: the script needs a number of steps here. Expected a spec "
            "whose k is a whole number"
        )
    return int(k)
