"""The host of tiny-recursive-model (lucidrains): `TinyRecursiveModel(..., grad="npg")`.

The model's `deep_refinement` evaluates refinement blocks one after the other, and only the last has
a graph. If the model has a `grad`, a strategy gets that loop:

- One evaluation of F is one block, `refine_latent_then_output_once`.
- The state is (outputs, latents). At the start both are learned vectors of shape (dim,). In the
  first block they get the shape (batch, tokens, dim).
- Without a `grad` the model's own code runs.

The similar model in `trm_dense_loss` has a loss on each block, and so is no equilibrium. It is not
hooked.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..contract.strategy import Context, GradStrategy
from ..loop import evaluations, repeated
from ..strategies import TBPTT
from ..strategies.registry import get_strategy
from .evaluation import attaches, watched
from .host import PatchingHost
from .patches import Patches
from .settings import fitting, memory_of
from .solve import loop_observed

_MODULE = "tiny_recursive_model.trm"


class TinyRecursive(PatchingHost):
    """The hook into `TinyRecursiveModel` of tiny-recursive-model 0.0.15."""

    name = "tiny_recursive_model"
    package = "tiny_recursive_model"
    distribution = "tiny-recursive-model"
    known_versions = ("0.0.15",)
    pip = '"deq-phantom-plugin[trm]"'
    in_eval = "told"

    def patch(self, patches: Patches) -> None:
        """Hook the constructor and the loop, when the package is loaded."""

        def apply(module: Any) -> None:
            patches.replace(module.TinyRecursiveModel, "__init__", _hook_init(self))
            patches.replace(module.TinyRecursiveModel, "deep_refinement", _hook_loop(self))

        patches.when_imported(_MODULE, apply)

    def is_equilibrium(self, module: nn.Module) -> bool:
        """Whether a module is a `TinyRecursiveModel`."""
        loaded = sys.modules.get(_MODULE)
        return loaded is not None and isinstance(module, loaded.TinyRecursiveModel)

    def prepare_grad(self, module: nn.Module, spec: Any) -> Callable[[], None]:
        """See `Host.prepare_grad`; None stands for the model's own gradient."""
        return functools.partial(_install, module, spec, _strategy(module, spec))


def _strategy(model: Any, spec: Any) -> GradStrategy | None:
    """Return the strategy of a spec, with the model's number of blocks as default steps."""
    if spec is None:
        return None
    return fitting(get_strategy(spec, {"steps": model.num_refinement_blocks}), "a loop")


def _install(model: Any, spec: Any, strategy: GradStrategy | None) -> None:
    """Give a model the strategy of a spec, and a memory if it needs one."""
    model.grad = strategy
    model.__dict__["_deq_phantom_made"] = (strategy, spec, model.num_refinement_blocks)
    if strategy is not None:
        memory_of(model)


def _current(model: Any) -> GradStrategy | None:
    """Return a model's strategy; make it anew if the loop has another length than it had then."""
    strategy: GradStrategy | None = getattr(model, "grad", None)
    made, spec, steps = model.__dict__.get("_deq_phantom_made", (None, None, 0))  # older: none
    if strategy is not None and strategy is made and steps != model.num_refinement_blocks:
        strategy = _strategy(model, spec)
        _install(model, spec, strategy)
    return strategy


def _hook_init(host: TinyRecursive) -> Callable[[Any], Any]:
    """Return the hook that lets the constructor take a `grad`."""

    def hook(original: Callable[..., None]) -> Callable[..., None]:
        def __init__(self: Any, *args: Any, grad: Any = None, **kwargs: Any) -> None:
            if grad is not None and not host.is_enabled:
                raise TypeError(
                    f"grad={grad!r}: TinyRecursiveModel takes a grad only while the host "
                    f"{host.name} is enabled. Call dpp.enable({host.name!r}) before"
                )
            original(self, *args, **kwargs)
            if grad is not None:
                _install(self, grad, _strategy(self, grad))

        parameters = [*inspect.signature(original).parameters.values()]
        parameters.append(inspect.Parameter("grad", inspect.Parameter.KEYWORD_ONLY, default=None))
        __init__.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return __init__

    return hook


def _hook_loop(host: TinyRecursive) -> Callable[[Any], Any]:
    """Return the hook that gives the loop of a model with a `grad` to its strategy."""

    def hook(original: Callable[..., Any]) -> Callable[..., Any]:
        def deep_refinement(self: Any, inputs: Tensor, outputs: Tensor, latents: Tensor) -> Any:
            strategy = _current(self) if host.is_enabled else None
            observers = host.observers(self) if self.training else []
            if not torch.is_grad_enabled() or (strategy is None and not observers):
                return original(self, inputs, outputs, latents)

            def block(state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
                refined: tuple[Tensor, Tensor] = self.refine_latent_then_output_once(inputs, *state)
                return refined

            start, steps = (outputs, latents), self.num_refinement_blocks
            if strategy is not None and not attaches(self):
                evaluate = evaluations(watched(self, block))
                with torch.no_grad():
                    return repeated(evaluate, start, steps)
            context = Context(initial_state=start, memory=getattr(self, "grad_memory", None))
            acting = (strategy or TBPTT(k=1)).resolve(context)
            return loop_observed(observers, block, start, steps, acting, context)

        return deep_refinement

    return hook
