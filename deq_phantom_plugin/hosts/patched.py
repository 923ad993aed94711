"""Models of patched repositories, for `dpp.set_grad`, `dpp.model_report` and `dpp.monitor`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..compilation import never_compiled
from ..patching import Equilibrium
from ..registry import get_strategy
from ..strategy import Context
from .host import Host, Solve, tell, with_counted

_SIGNATURE = inspect.signature(Equilibrium.forward)


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

        def before(equilibrium: Any, args: Any, kwargs: Any) -> Any:
            return with_counted(args, kwargs)

        def after(equilibrium: Any, args: Any, kwargs: Any, attached: Any) -> None:
            if equilibrium.training and torch.is_grad_enabled():
                _tell(callback, equilibrium, args, kwargs, attached)

        handles = [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, with_kwargs=True),
        ]

        def end() -> None:
            for handle in handles:
                handle.remove()

        return end


@never_compiled
def _tell(
    callback: Callable[[Solve], None],
    equilibrium: Equilibrium,
    args: Any,
    kwargs: Any,
    attached: Any,
) -> None:
    given = _SIGNATURE.bind(equilibrium, *args, **kwargs)
    given.apply_defaults()
    _, counted, found, start, step = given.args
    found = tree_map(Tensor.detach, found)
    strategy = equilibrium.grad
    context = Context(
        batch_dim=equilibrium.batch_dim,
        initial_state=tree_map(torch.zeros_like, found) if start is None else start,
        step=None if step is None or step < 0 else int(step),
        memory=equilibrium.memory,
    )
    nfe = counted.nfe if strategy.resolve(context).owns_solve else 0
    tell([callback], counted.func, found, attached, strategy, context, nfe)
