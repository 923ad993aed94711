"""Label smoothing of a Transformers `Trainer`, which knows causal models by a list of their names.

With `label_smoothing_factor` a Trainer takes the labels out of the batch and computes the loss from
the logits. A model that is not on its list is scored by the token that it sees, not by the next
one, and what else was in the model's own loss is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.trainer_pt_utils import LabelSmoother

from deq_phantom_plugin.hosts.patches import Patches

__all__ = ["OutputTuple", "smooth_outputs_of"]


class OutputTuple(tuple[Any, ...]):
    """An output as a tuple (`return_dict=False`), which still knows what it was.

    Attributes:
        output: the output.
    """

    output: Any

    @classmethod
    def of(cls, output: Any, values: tuple[Any, ...]) -> OutputTuple:
        """Return the values of an output."""
        made = cls(values)
        made.output = output
        return made


def smooth_outputs_of(output: type, extra: Callable[[Any, Tensor, Any], Tensor | None]) -> None:
    """Let Transformers' label smoothing know the outputs of a causal model, whatever its name.

    Args:
        output: their class; those of other classes are smoothed as ever.
        extra: from an output, the labels of the next tokens and `num_items_in_batch` to what joins
            the loss, None for nothing.
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
