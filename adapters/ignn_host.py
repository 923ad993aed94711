"""The host by which `dpp.set_grad`, reports and monitors find implicit graph layers in a model."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import deq_phantom_plugin as dpp
from deq_phantom_plugin.hosts import Host, Solve, tell

__all__ = ["IGNNHost"]


class IGNNHost(Host):
    """Lets `dpp.set_grad`, `dpp.model_report` and `dpp.monitor` find the layers in a model.

    The layers take specs by themselves, so that there is nothing to enable, and need no package
    but PyTorch.
    """

    name = "ignn"
    package = "torch"
    pip = '"deq-phantom-plugin[graph]"'

    @property
    def is_enabled(self) -> bool:
        """False: nothing foreign is hooked."""
        return False

    def enable(self) -> None:
        """Do nothing."""

    def disable(self) -> None:
        """Do nothing."""

    def is_equilibrium(self, module: nn.Module) -> bool:
        """Whether a module is the equilibrium of an `IGNNConv`."""
        # A model has none where nobody has imported the layers, and with them PyG.
        layers = sys.modules.get("deq_phantom_plugin.adapters.ignn")
        return layers is not None and isinstance(module, layers.FixedPoint)

    def prepare_grad(self, module: nn.Module, spec: Any) -> Callable[[], None]:
        """See `Host.prepare_grad`."""
        return functools.partial(setattr, module, "grad", dpp.get_strategy(spec))

    def observe(self, module: nn.Module, callback: Callable[[Solve], None]) -> Callable[[], None]:
        """See `Host.observe`."""

        def after(equilibrium: Any, args: Any, attached: Tensor) -> None:
            if equilibrium.training and torch.is_grad_enabled():
                func, start = args
                context = dpp.Context(
                    batch_dim=None, initial_state=start, memory=equilibrium.memory
                )
                grad, nfe = equilibrium.grad, equilibrium.nfe
                tell([callback], func, attached.detach(), attached, grad, context, nfe)

        return module.register_forward_hook(after).remove
