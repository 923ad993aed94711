"""Where the solves of a training step begin: at what the same samples had the last time."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from .._plumbing.compilation import never_compiled
from .._plumbing.trial import Trial
from .._plumbing.whole import Sharded
from ..contract.state import State, flatten, unflatten

Samples = Tensor | Sequence[int]


class SampleStarts:
    """The latest state of each sample, kept on the host, for its next solve to begin at.

        self.starts = dpp.SampleStarts()  # in a model
        start = self.starts.begin(samples, start)  # in its forward, in training
        states, info = self.deq(func, start)
        self.starts.keep(samples, states[-1])

    An equilibrium moves little from one epoch to the next, so that a solve that begins there needs
    fewer evaluations, or ends at a smaller residual. The equilibrium and its gradient are those of
    any start, as far as the solve gets.

    What is kept takes as much memory of the host as the states of all samples. Each process keeps
    those of the samples that it has seen. Nothing goes into a `state_dict`, a copy or a pickle, so
    that a resumed run begins anew. The numbers of samples are those of one data set: leave
    evaluation out, whose samples have other states under the same numbers.

    A state may be any nesting of tensors with the samples along dimension 0. A sample whose state
    has another shape than what is kept, such as an image of another size, begins where it would
    have. So does one whose last state was not finite.
    """

    def __init__(self) -> None:
        self._rows: dict[int, list[Tensor]] = {}
        self._coming: tuple[list[int], list[Tensor], Any] | None = None

    def __len__(self) -> int:
        """Return the number of samples that are kept."""
        self._arrive()
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        self._arrive()
        return sum(row.nbytes for rows in self._rows.values() for row in rows)

    def clear(self) -> None:
        """Forget all samples."""
        self._rows, self._coming = {}, None

    @never_compiled
    def begin(self, samples: Samples | None, start: State) -> State:
        """Return where to begin: `start`, with what is kept in place of it.

        Args:
            samples: the number of each sample in the data set, shape (B,); on the host, or the host
                waits for it.
            start: where samples begin that have not been seen, of any structure, shapes (B, ...).

        Returns:
            A state like `start`, without a graph.

        Raises:
            ValueError: if `samples` are not B whole numbers of at least 0, or the state is one of
                `torch.func` or a `DTensor`.
            RuntimeError: inside a backward pass, which evaluates a checkpointed part again: that
                would begin elsewhere than the forward pass did.
        """
        leaves, structure = flatten(start)
        numbers = _numbers(samples, leaves)
        self._arrive()
        begin = [leaf.detach() for leaf in leaves]
        shapes = [leaf.shape[1:] for leaf in leaves]
        known = [
            place
            for place, number in enumerate(numbers)
            if [row.shape for row in self._rows.get(number, [])] == shapes
        ]
        if known:
            where = torch.tensor(known, device="cpu")
            for place, leaf in enumerate(begin):
                rows = torch.stack([self._rows[numbers[n]][place] for n in known])
                rows = _to_device(rows, leaf).to(leaf.dtype)
                begin[place] = leaf.clone().index_copy_(0, _to_device(where, leaf), rows)
        return unflatten(begin, structure)

    @never_compiled
    def keep(self, samples: Samples | None, state: State) -> None:
        """Keep the states of samples; of one that comes twice in a batch, the last.

        From an accelerator they are on their way while training goes on. A report or a monitor
        that calls the model keeps nothing.

        Args:
            samples: as in `begin`.
            state: what a solve has found, shapes (B, ...).

        Raises:
            ValueError: see `begin`.
            RuntimeError: see `begin`.
        """
        leaves = [leaf.detach() for leaf in flatten(state)[0]]
        numbers = _numbers(samples, leaves)
        if Trial.depth():
            return
        self._arrive()
        copies = [_to_host(leaf) for leaf in leaves]
        event = None
        if on_device := [leaf.device for leaf in leaves if leaf.is_cuda]:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(on_device[0]))
        self._coming = numbers, copies, event
        if event is None:
            self._arrive()

    def _arrive(self) -> None:
        """Take in what was on its way."""
        if self._coming is None:
            return
        (numbers, leaves, event), self._coming = self._coming, None
        if event is not None:
            event.synchronize()
        for place, number in enumerate(numbers):
            rows = [leaf[place].clone() for leaf in leaves]  # a view would keep the whole batch
            if all(bool(row.isfinite().all()) for row in rows):
                self._rows[number] = rows
            else:
                self._rows.pop(number, None)

    def __getstate__(self) -> dict[str, Any]:
        return {"_rows": {}, "_coming": None}


def starts_of(warm_start: Any) -> SampleStarts | None:
    """Return what a setting of models names.

    Raises:
        ValueError: if it is neither "sample" nor None.
    """
    if not (warm_start is None or (isinstance(warm_start, str) and warm_start == "sample")):
        raise ValueError(f"warm_start={warm_start!r}; expected 'sample' or None")
    return None if warm_start is None else SampleStarts()


def _numbers(samples: Samples | None, leaves: Sequence[Tensor]) -> list[int]:
    """Return the numbers of samples as the host's.

    Raises:
        ValueError: if they are none, or the state's samples are not to be had.
        RuntimeError: inside a backward pass.
    """
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "a warm start inside a backward pass (activation checkpointing evaluates the model "
            "again there): it would begin elsewhere than the forward pass did. Take "
            "upg(checkpoint=True), or leave the solve out of what is checkpointed"
        )
    if any(is_functorch_wrapped_tensor(leaf) for leaf in leaves):
        raise ValueError("a warm start inside torch.func; expected a state of ordinary tensors")
    if Sharded.of(list(leaves)) is not None:
        raise ValueError("a warm start of a DTensor; expected a state of ordinary tensors")
    size = {leaf.shape[0] if leaf.ndim else None for leaf in leaves}
    given: Any = samples
    found = given.tolist() if hasattr(given, "tolist") else given
    whole = isinstance(found, Sequence) and all(_is_number(n) for n in found)
    if found is None or not whole or size != {len(found)}:
        shapes = [tuple(leaf.shape) for leaf in leaves]
        raise ValueError(
            f"samples={samples!r:.80} of a state of shapes {shapes}; expected the number in the "
            "data set of each sample along dimension 0: whole numbers of at least 0, from a "
            "data set that returns them beside its samples"
        )
    return [int(n) for n in found]


def _is_number(n: Any) -> bool:
    return isinstance(n, Integral) and not isinstance(n, bool) and int(n) >= 0


def _to_host(leaf: Tensor) -> Tensor:
    """Return a copy on the host, which may still be on its way."""
    if not leaf.is_cuda:
        return leaf.to("cpu", copy=True)
    copy = torch.empty(leaf.shape, dtype=leaf.dtype, pin_memory=True, device="cpu")
    return copy.copy_(leaf, non_blocking=True)


def _to_device(x: Tensor, like: Tensor) -> Tensor:
    """Return a tensor of the host's where another one is, without a wait."""
    return x.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else x.to(like.device)
