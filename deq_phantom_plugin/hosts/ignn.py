"""The host by which `dpp.set_grad`, reports and monitors find implicit graph layers in a model."""

from __future__ import annotations

import sys

from torch import nn

from deq_phantom_plugin.hosts.own import Own

__all__ = ["IGNNHost"]


class IGNNHost(Own):
    """Lets `dpp.set_grad`, `dpp.model_report` and `dpp.monitor` find the layers in a model.

    The layers take specs by themselves, so that there is nothing to enable, and need no package
    but PyTorch.
    """

    name = "ignn"
    pip = '"deq-phantom-plugin[graph]"'

    def is_equilibrium(self, module: nn.Module) -> bool:
        """Whether a module is the equilibrium of an `IGNNConv`."""
        # A model has none where nobody has imported the layers, and with them PyG.
        layers = sys.modules.get("deq_phantom_plugin.adapters.ignn")
        return layers is not None and isinstance(module, layers.FixedPoint)
