"""Models of patched repositories, for `dpp.set_grad`, `dpp.model_report` and `dpp.monitor`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..patching import Equilibrium
from ..registry import get_strategy
from .host import Host, Solve, relative_residual


class Patched(Host):
    """Finds the equilibria that `deq-phantom patch` put into a model; there is nothing to hook."""

    name = "patched"
    package = "torch"
    pip = "torch"

    @property
    def is_enabled(self) -> bool:
        """False: nothing foreign is hooked."""
        return False

    def enable(self) -> None:
        """Do nothing."""

    def disable(self) -> None:
        """Do nothing."""

    def is_equilibrium(self, module: nn.Module) -> bool:
        """Whether a module is an equilibrium of a patched model."""
        return isinstance(module, Equilibrium)

    def prepare_grad(self, module: nn.Module, spec: Any) -> Callable[[], None]:
        """See `Host.prepare_grad`."""
        return functools.partial(setattr, module, "grad", get_strategy(spec))

    def observe(self, module: nn.Module, callback: Callable[[Solve], None]) -> Callable[[], None]:
        """See `Host.observe`; the evaluations of the model's own solver are not known, 0."""

        def after(equilibrium: Any, args: Any, kwargs: Any, attached: Any) -> None:
            if equilibrium.training and torch.is_grad_enabled():
                callback(_solve(equilibrium, args[0], args[1], kwargs, attached))

        return module.register_forward_hook(after, with_kwargs=True).remove


def _solve(equilibrium: Equilibrium, func: Any, found: Any, kwargs: Any, attached: Any) -> Solve:
    state = tree_map(Tensor.detach, found)
    with torch.no_grad():
        image = func(state)
    step = kwargs.get("step")
    return Solve(
        func=func,
        initial_state=tree_map(torch.zeros_like, state),
        equilibrium=state,
        attached=attached,
        strategy=equilibrium.grad,
        step=step if step is not None and step >= 0 else equilibrium.memory.step,
        residual=relative_residual(state, image, equilibrium.batch_dim),
        nfe=0,
        batch_dim=equilibrium.batch_dim,
    )
