"""Corrects the label smoothing of a Transformers `Trainer` for the causal models of this package.

With `label_smoothing_factor`, a Trainer takes the labels out of the batch, and computes the loss
from the logits. It recognises causal models by a list of names. For any other model it would
compare the logits with the token that the model sees, not with the next token. Other terms of the
model's own loss would be lost. So the smoother is hooked for the outputs of our models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor
from transformers.trainer_pt_utils import LabelSmoother
from transformers.utils.generic import ModelOutput

from deq_phantom_plugin.hosts.patches import Patches

__all__ = ["OutputTuple", "smooth_outputs_of"]


class OutputTuple(tuple[Any, ...]):
    """The values of an output (`return_dict=False`), in a tuple that knows what they are.

    Accelerate and `DataParallel` rebuild a tuple as `type(values)(new values)`, for other dtypes or
    devices. So the class has the names of the values: each set of names has a class of its own.

    Attributes:
        kind: the class of the output.
        names: the names of the values.
    """

    kind: ClassVar[type[ModelOutput]]
    names: ClassVar[tuple[str, ...]]
    _made: ClassVar[dict[Any, type[OutputTuple]]] = {}

    @classmethod
    def of(cls, output: ModelOutput, values: tuple[Any, ...]) -> OutputTuple:
        """Return a tuple of the values of an output that are not None."""
        return _tuple_of(type(output), tuple(output.keys()), values)

    @property
    def output(self) -> Any:
        """The output, made of the values that are in the tuple now."""
        return self.kind(**dict(zip(self.names, self, strict=True)))

    def __reduce__(self) -> Any:
        return _tuple_of, (self.kind, self.names, tuple(self))


def _tuple_of(
    kind: type[ModelOutput], names: tuple[str, ...], values: tuple[Any, ...]
) -> OutputTuple:
    """Return an `OutputTuple`, of the class for these names."""
    cls = OutputTuple._made.get((kind, names))
    if cls is None:
        known = {"kind": kind, "names": names, "__module__": __name__}
        cls = type("OutputTuple", (OutputTuple,), known)
        OutputTuple._made[kind, names] = cls
    return cls(values)


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
