"""The Jacobian regulariser in a loss: of sequences, of a part of a step, and whether it joined."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deq_phantom_plugin._plumbing.compilation import never_compiled
from deq_phantom_plugin._plumbing.once import warn_once
from deq_phantom_plugin.contract.errors import AssumptionWarning

__all__ = ["Joins", "by_sequence", "share_of_step"]


def by_sequence(
    func: Callable[[Tensor], Tensor], state: Tensor, real: Tensor | None, weights: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """Scale F: ||J||_F^2 of each sequence over its own tokens, times its share; not of padding."""
    batch, length, _ = state.shape
    count = state.new_full((batch,), length) if real is None else real.sum((1, 2))
    share = (count if weights is None else weights).to(state.dtype)
    share = share / share.sum().clamp_min(1)
    scale = (share * batch * length / count.clamp_min(1)).sqrt()[:, None, None]

    def scaled(h: Tensor) -> Tensor:
        return func(h) * scale

    return scaled


def share_of_step(
    jac_loss: Tensor, targets: Tensor, num_items_in_batch: Tensor | int | None
) -> Tensor:
    """Weigh the regulariser of a part of a step by its labels, as cross-entropy is.

    Args:
        jac_loss: of this part.
        targets: what each token is to predict, -100 for nothing.
        num_items_in_batch: labels of the whole step; None where this is all of it.
    """
    if num_items_in_batch is None:
        return jac_loss
    items = torch.as_tensor(num_items_in_batch, device=jac_loss.device).reshape(-1)[0]
    return jac_loss * (targets.ne(-100).sum().to(jac_loss.device) / items)


class Joins:
    """Finds out whether the regulariser of a step joined the loss that was differentiated.

    Who computes a loss of their own, a Trainer's `compute_loss_func` among them, has to add it.
    """

    def __init__(self) -> None:
        self._passed: set[str] = set()

    @never_compiled
    def watch(self, states: Tensor, jac_loss: Tensor | None) -> None:
        """Say so if the last backward pass left the regulariser out, and watch the next one."""
        if self._passed == {"states"}:
            warn_once(
                "regulariser left out",
                "a backward pass went through the states of a DEQ transformer in training, and "
                "not through its Jacobian regulariser (config.jac_reg_weight); a loss of your own, "
                "such as a Trainer's compute_loss_func, has to add output.jac_loss",
                AssumptionWarning,
            )
        self._passed = passed = set()
        if jac_loss is not None and jac_loss.requires_grad and states.requires_grad:
            states.register_hook(lambda _: passed.add("states"))
            jac_loss.register_hook(lambda _: passed.add("jac_loss"))
