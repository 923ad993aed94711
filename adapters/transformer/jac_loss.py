"""The Jacobian regulariser in the loss of a language model.

`by_sequence` weighs it by sequence. `share_of_step` scales it for gradient accumulation. `Joins`
warns if a loss of the user's own leaves it out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deq_phantom_plugin._plumbing.compilation import never_compiled
from deq_phantom_plugin._plumbing.once import warn_once
from deq_phantom_plugin._plumbing.trial import Trial
from deq_phantom_plugin.contract.errors import AssumptionWarning

__all__ = ["Joins", "by_sequence", "share_of_step"]


def by_sequence(
    func: Callable[[Tensor], Tensor], state: Tensor, real: Tensor | None, weights: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """Return F scaled such that the regulariser weighs each sequence by its share of the batch.

    The regulariser is ||J||_F^2 / (B L D), with D = hidden_size. With the scaled F, sequence b
    contributes share_b ||J_b||_F^2 / (count_b D), where count_b is the number of its tokens without
    padding. The scale is multiplied into J, and J is squared, so the scale is the square root of
    share_b B L / count_b.

    Args:
        func: F, from and to shape (B, L, hidden_size).
        state: h, shape (B, L, hidden_size).
        real: True for tokens and False for padding, shape (B, L, 1); None without padding.
        weights: the share of each sequence, up to a factor, shape (B,); its tokens if None.
    """
    batch, length, _ = state.shape
    dtype = torch.promote_types(state.dtype, torch.float32)  # float16 ends at 65,504 tokens
    count = state.new_full((batch,), length, dtype=dtype)
    if real is not None:
        count = real.sum((1, 2)).to(dtype)
    share = (count if weights is None else weights).to(dtype)
    share = share / share.sum().clamp_min(torch.finfo(dtype).tiny)  # weights may all be zero
    scale = (share * batch * length / count.clamp_min(1)).sqrt()[:, None, None].to(state.dtype)

    def scaled(h: Tensor) -> Tensor:
        return func(h) * scale

    return scaled


def share_of_step(
    jac_loss: Tensor, targets: Tensor, num_items_in_batch: Tensor | int | None
) -> Tensor:
    """Scale the regulariser of one batch of a step by its share of the labels, as cross-entropy is.

    Args:
        jac_loss: the regulariser of this batch, a scalar.
        targets: the token that each token predicts, shape (B, L); -100 for none.
        num_items_in_batch: the number of labels in the whole step; None if this batch is the step.
    """
    if num_items_in_batch is None:
        return jac_loss
    items = torch.as_tensor(num_items_in_batch, device=jac_loss.device).reshape(-1)[0]
    return jac_loss * (targets.ne(-100).sum().to(jac_loss.device) / items)


class Joins:
    """Finds out whether the regulariser of a step was a part of the loss that was differentiated.

    A loss of the user's own, such as a Trainer's `compute_loss_func`, has to add the regulariser.
    """

    def __init__(self) -> None:
        self._passed: set[str] = set()

    @never_compiled
    def watch(self, states: Tensor, jac_loss: Tensor | None) -> None:
        """Warn if the last backward pass left the regulariser out, and watch the next one.

        A report differentiates a loss to the states alone, so what runs in a `Trial` is no step.
        Nor is a loss that is differentiated to `hidden_states`: the hook is on what lies behind.
        """
        if Trial.depth():
            return
        if self._passed == {"states"}:
            warn_once(
                "regulariser left out",
                "a backward pass went through the states of a DEQ transformer in training, and "
                "not through its Jacobian regulariser (config.jac_reg_weight), so the regulariser "
                "had no effect. Add output.jac_loss to a loss of your own, such as a Trainer's "
                "compute_loss_func",
                AssumptionWarning,
            )
        self._passed = passed = set()
        if jac_loss is not None and jac_loss.requires_grad and states.grad_fn is not None:
            states.grad_fn.register_hook(lambda *_: passed.add("states"))
            jac_loss.register_hook(lambda _: passed.add("jac_loss"))
