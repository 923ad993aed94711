"""The host of this package's implicit graph layers (IGNN)."""

from __future__ import annotations

from .own import Own


class IGNNHost(Own):
    """Lets `dpp.set_grad`, `dpp.model_report` and `dpp.monitor` find the layers in a model.

    The layers take specs by themselves, so there is nothing to enable. This host needs no package
    but PyTorch.
    """

    name = "ignn"
    pip = '"deq-phantom-plugin[graph]"'
