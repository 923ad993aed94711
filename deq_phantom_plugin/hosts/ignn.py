"""The host by which `dpp.set_grad`, reports and monitors find implicit graph layers in a model."""

from __future__ import annotations

from .own import Own


class IGNNHost(Own):
    """Lets `dpp.set_grad`, `dpp.model_report` and `dpp.monitor` find the layers in a model.

    The layers take specs by themselves, so that there is nothing to enable, and need no package
    but PyTorch.
    """

    name = "ignn"
    pip = '"deq-phantom-plugin[graph]"'
