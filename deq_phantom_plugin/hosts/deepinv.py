"""The host of deepinv: `DEQConfig(grad="upg")` for its equilibrium reconstructions.

deepinv solves without autograd. Then `BaseOptim.DEQ_additional_step` makes one more iteration for
the gradient, with a hook on it for implicit differentiation. If the config has a `grad`, the
strategy replaces that step. The state is all that an iteration passes on: the primal iterate, and
the dual iterate if the algorithm has one.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..contract.strategy import Context, GradStrategy
from ..strategies import IFT, JFB
from ..strategies.registry import get_strategy
from .host import PatchingHost
from .patches import Patches
from .settings import defaults, fitting, memory_of
from .solve import attach_observed, tell

_MODULE = "deepinv.optim.optimizers"
_SOLVE = "the solve of deepinv"
# Maps settings of the config to our argument, and the setting's default; see `defaults`.
_SETTINGS = {
    "anderson_acceleration_backward": ("solver", False),
    "max_iter_backward": ("max_iter", 50),
}


class DeepInv(PatchingHost):
    """The hook into deepinv 0.5."""

    name = "deepinv"
    package = "deepinv"
    known_versions = ("0.5",)
    pip = "deepinv"
    in_eval = "always"

    def patch(self, patches: Patches) -> None:
        """Hook the config and the step at the equilibrium, when deepinv is loaded."""

        def apply(module: Any) -> None:
            patches.replace(module.DEQConfig, "__init__", _hook_config(self))
            patches.replace(module.BaseOptim, "__init__", _hook_init)
            patches.replace(module.BaseOptim, "DEQ_additional_step", _hook_step(self))

        patches.when_imported(_MODULE, apply)

    def is_equilibrium(self, module: nn.Module) -> bool:
        """Whether a module is an algorithm of deepinv that is trained as an equilibrium."""
        loaded = sys.modules.get(_MODULE)
        return loaded is not None and isinstance(module, loaded.BaseOptim) and bool(module.DEQ)

    def prepare_grad(self, module: nn.Module, spec: Any) -> Callable[[], None]:
        """See `Host.prepare_grad`."""
        strategy = fitting(get_strategy(spec, _defaults(module.DEQ_config)), _SOLVE)

        def switch() -> None:
            module.DEQ_config = copy.copy(module.DEQ_config)  # other modules may share the config
            module.DEQ_config.grad = strategy  # type: ignore[union-attr, assignment]
            memory_of(module)

        return switch


def _defaults(config: Any) -> dict[str, Any]:
    """Return the config's settings of the backward solve that are not the defaults."""
    return defaults(functools.partial(getattr, config), _SETTINGS, {"True": "anderson"})


def _hook_config(host: DeepInv) -> Callable[[Any], Any]:
    """Return the hook that lets a config take a `grad`."""

    def hook(original: Callable[..., None]) -> Callable[..., None]:
        def __init__(self: Any, *args: Any, grad: Any = None, **kwargs: Any) -> None:
            if grad is not None and not host.is_enabled:
                raise TypeError(
                    f"grad={grad!r}: DEQConfig takes a grad only while the host deepinv is "
                    "enabled. Call dpp.enable('deepinv') before"
                )
            original(self, *args, **kwargs)
            if grad is None:
                return
            if self.jacobian_free:
                raise ValueError(
                    f"grad={grad!r} beside jacobian_free=True: both choose the gradient. Pass "
                    "grad alone; grad='jfb' does what jacobian_free=True does"
                )
            self.grad = fitting(get_strategy(grad, _defaults(self)), _SOLVE)

        parameters = [*inspect.signature(original).parameters.values()]
        parameters.append(inspect.Parameter("grad", inspect.Parameter.KEYWORD_ONLY, default=None))
        __init__.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return __init__

    return hook


def _hook_init(original: Callable[..., None]) -> Callable[..., None]:
    """Give an algorithm a memory if its config has a `grad`."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if getattr(self.DEQ_config, "grad", None) is not None:
            memory_of(self)

    return __init__


def _hook_step(host: DeepInv) -> Callable[[Any], Any]:
    """Return the hook that attaches the strategy in place of deepinv's additional step."""

    def hook(original: Callable[..., Any]) -> Callable[..., Any]:
        def DEQ_additional_step(self: Any, X: Any, y: Any, physics: Any, **kwargs: Any) -> Any:
            strategy = getattr(self.DEQ_config, "grad", None) if host.is_enabled else None
            observers = host.observers(self) if self.training else []
            if not torch.is_grad_enabled() or (strategy is None and not observers):
                return original(self, X, y, physics, **kwargs)
            found = tuple(leaf.detach() for leaf in X["est"] if isinstance(leaf, Tensor))

            def func(est: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                last = self.max_iter - 1
                new = self.fixed_point.iterator(
                    {**X, "est": _put(X["est"], est)},
                    self.update_data_fidelity_fn(last),
                    self.update_prior_fn(last),
                    self.update_params_fn(last),
                    y,
                    physics,
                    **kwargs,
                )["est"]
                return tuple(leaf for leaf in new if isinstance(leaf, Tensor))

            context = Context(initial_state=found, memory=getattr(self, "grad_memory", None))
            if strategy is None:
                x = original(self, X, y, physics, **kwargs)
                x = x.view_as(x)
                acting: GradStrategy = JFB() if self.DEQ_config.jacobian_free else IFT()
                attached = (x, *found[1:])
                tell(observers, func, found, attached, acting, context, self.max_iter)
                return x
            acting = strategy.resolve(context)
            if acting.owns_solve:
                raise ValueError(
                    f"{acting!r} finds the equilibrium itself, but deepinv has solved already. "
                    "Take a strategy that attaches to a solved state, such as upg or ift"
                )
            return attach_observed(observers, func, found, acting, context, self.max_iter)[0]

        return DEQ_additional_step

    return hook


def _put(est: Any, leaves: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Return an iterate with its tensors replaced, in order; what is no tensor stays."""
    rest = iter(leaves)
    return tuple(next(rest) if isinstance(leaf, Tensor) else leaf for leaf in est)
