"""What Transformers collects of a model's layers, such as `hidden_states`, during a solve.

Transformers collects by hooks that see each evaluation of F. The model must see only those that its
own code would have made.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .._plumbing.trial import Trial

__all__ = ["Collected", "OfLoop"]


class Collected:
    """The outputs of layers that a model collects, by hooks that see each evaluation of F.

    An object of this class remembers what was collected before a solve or an evaluation, so that
    what is collected since then can be removed.
    """

    def __init__(self) -> None:
        from transformers.utils import output_capturing

        found = output_capturing._active_collector.get() or {}
        self._lists = {key: value for key, value in found.items() if isinstance(value, list)}
        self._selected = found.get("_hidden_states_layers")
        self._lengths = {key: len(value) for key, value in self._lists.items()}

    def __bool__(self) -> bool:
        """Whether the model collects anything."""
        return bool(self._lists)

    def wants(self, key: str) -> bool:
        """Whether the model collects outputs of this kind."""
        return key in self._lists

    def forget(self, *keys: str) -> None:
        """Remove what was collected since this object was made, of these kinds or of all."""
        for key in keys or self._lists:
            del self._lists[key][self._lengths[key] :]

    def states(self, first: Tensor, output: Tensor) -> None:
        """Collect the output of this layer, and its input if it is the first layer."""
        if not self.wants("hidden_states"):
            return
        self.forget("hidden_states")
        states = self._lists["hidden_states"]
        for state in [output] if states else [first, output]:
            chosen = self._selected is None or len(states) in self._selected
            states.append(state if chosen else None)


class OfLoop:
    """F of a loop, whose collected outputs are those of the loop's own evaluations.

    A strategy may evaluate F more often, for its graph or to find out what F is. What is collected
    in those evaluations is removed.

    Args:
        func: F.
        steps: the number of evaluations of the loop.
    """

    def __init__(self, func: Callable[[Tensor], Tensor], steps: int) -> None:
        self.__wrapped__, self._left = func, steps
        self._collected: Collected | None = Collected()

    def __call__(self, state: Tensor) -> Tensor:
        """Evaluate F."""
        if self._collected is None or not self._collected:
            return self.__wrapped__(state)
        self._collected.forget()  # activation checkpointing may have run layers once more
        image = self.__wrapped__(state)
        if self._left and not Trial.depth():
            self._left, self._collected = self._left - 1, Collected()
        else:
            self._collected.forget()
        return image

    def end(self) -> None:
        """Remove what was collected since the loop's last evaluation. Later ones are not seen."""
        if self._collected is not None:
            self._collected.forget()
        self._collected = None  # a graph may keep this object, and must not keep all the outputs
