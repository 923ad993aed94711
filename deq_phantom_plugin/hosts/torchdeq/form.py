"""Converts states between the user's form and the form in which TorchDEQ solves.

TorchDEQ may pack a state of several tensors into one flat vector.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...contract.state import State


class Form:
    """Converts what TorchDEQ passes to a solver or a gradient into the user's state, and back.

    Parts of a flat vector have lost their memory format. They get the format of the initial state
    back if that is known (`remember`): in another format a convolutional F is slower, by more than
    the copies cost.

    Args:
        deq_func: the function that TorchDEQ passes on: its wrapper of F, or any other function.
    """

    def __init__(self, deq_func: Any) -> None:
        from torchdeq.utils.layer_utils import DEQWrapper, MDEQWrapper

        self._deq_func = deq_func
        self._flat = isinstance(deq_func, MDEQWrapper)
        self._wrapped = isinstance(deq_func, DEQWrapper | MDEQWrapper)
        self._of_tensor = type(deq_func) is DEQWrapper
        self._models = getattr(deq_func, "deq_phantom_start", None)

    @staticmethod
    def remember(deq_func: Any, start: State | None) -> None:
        """Let a wrapper know the initial state, for its memory formats."""
        deq_func.deq_phantom_start = start

    def unpack(self, z: Any) -> State:
        """Return the user's state: a tensor or a list of tensors."""
        if not self._flat:
            return z if isinstance(z, Tensor) else list(z)
        return like_start(self._deq_func.vec2list(z), self._models)

    def pack(self, state: State) -> Any:
        """Return a state in TorchDEQ's form."""
        return self._deq_func.list2vec(state) if self._flat else state

    @property
    def func(self) -> Callable[[State], State]:
        """F as a function of the user's state."""
        func: Callable[..., Any] = self._deq_func.func if self._wrapped else self._deq_func
        if self._of_tensor:
            return func

        @functools.wraps(func, assigned=(), updated=())
        def on_state(state: State) -> State:
            return evaluate(func, state)

        return on_state


def evaluate(func: Callable[..., Any], state: State) -> State:
    """Return F at a state; the user's function takes the tensors of a list as single arguments."""
    return func(state) if isinstance(state, Tensor) else list(func(*state))


def map_leaves(function: Callable[[Tensor], Tensor], state: State) -> State:
    """Return a state, a tensor or a list of tensors, with a function applied to each tensor."""
    return function(state) if isinstance(state, Tensor) else [function(leaf) for leaf in state]


def like_start(state: State, start: State | None) -> State:
    """Return a state in the memory formats of the initial state, if that is a known list."""
    if start is None or isinstance(state, Tensor):
        return state
    return [_like(leaf, model) for leaf, model in zip(state, start, strict=True)]


def _like(leaf: Tensor, model: Tensor) -> Tensor:
    """Return a leaf in the channels_last format if the model tensor has that format."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    wanted = formats.get(model.dim())
    if wanted is None or model.is_contiguous() or not model.is_contiguous(memory_format=wanted):
        return leaf
    return leaf.contiguous(memory_format=wanted)
