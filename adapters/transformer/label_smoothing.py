"""Corrects the label smoothing of a Transformers `Trainer` for the causal models of this package.

With `label_smoothing_factor`, a Trainer takes the labels out of the batch, and computes the loss
from the logits. It recognises causal models by a list of names. For any other model it would
compare the logits with the token that the model sees, not with the next token. Other terms of the
model's own loss would be lost. So the smoother is hooked for the outputs of our models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.trainer_pt_utils import LabelSmoother

from deq_phantom_plugin.hosts.patches import Patches

__all__ = ["OutputTuple", "smooth_outputs_of"]


class OutputTuple(tuple[Any, ...]):
    """The values of an output (`return_dict=False`), with a reference to the output itself.

    Attributes:
        output: the output.
    """

    output: Any

    @classmethod
    def of(cls, output: Any, values: tuple[Any, ...]) -> OutputTuple:
        """Return a tuple of values that remembers its output."""
        made = cls(values)
        made.output = output
        return made


def smooth_outputs_of(output: type, extra: Callable[[Any, Tensor, Any], Tensor | None]) -> None:
    """Hook Transformers' label smoothing for the outputs of a causal model.

    Args:
        output: the class of the outputs. Outputs of other classes are smoothed as before.
        extra: a function of an output, the labels of the next tokens and `num_items_in_batch`. It
            returns a term to add to the loss, or None.
    """

    def hook(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def smooth(
            self: Any, model_output: Any, labels: Tensor, shift_labels: bool = False, **kwargs: Any
        ) -> Tensor:
            if isinstance(model_output, OutputTuple):
                model_output = model_output.output
            if not isinstance(model_output, output):
                return original(self, model_output, labels, shift_labels, **kwargs)
            loss = original(self, model_output, labels, shift_labels=True, **kwargs)
            more = extra(model_output, labels[..., 1:], kwargs.get("num_items_in_batch"))
            return loss if more is None else loss + more

        return smooth

    Patches().replace(LabelSmoother, "__call__", hook)
