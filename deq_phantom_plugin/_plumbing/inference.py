"""Refuses derivatives in `torch.inference_mode`, where autograd records nothing."""

from __future__ import annotations

import torch


def refuse_in_inference_mode(user: object) -> None:
    """Raise an error in inference mode, for code that takes derivatives.

    `torch.enable_grad` does not help there. Results have no graph, as if F were a constant, and a
    Jacobian of zeros would pass for the right one.

    Args:
        user: what takes derivatives, such as a strategy; for the error.

    Raises:
        RuntimeError: in inference mode.
    """
    # Compiled code does not know of inference mode.
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{user} takes derivatives, and this is torch.inference_mode, where autograd records "
            "nothing, not even under torch.enable_grad. Use torch.no_grad instead (in Lightning: "
            "Trainer(inference_mode=False)). Or call it inside `with torch.inference_mode(False):` "
            "on tensors that were made outside of inference mode, or are cloned in that block"
        )
