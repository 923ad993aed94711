"""Trees of tensors: taken apart into leaves and a structure, and put together again."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

State: TypeAlias = Any
"""A tensor, or any nesting of tuples, lists and dicts of tensors."""

_LEAF = tree_flatten(0)[1]  # the structure of a tensor alone


def flatten(state: State) -> tuple[list[Tensor], TreeSpec]:
    """Take a state apart into its leaves and its structure."""
    if type(state) is Tensor:  # the common case, at a tenth of the time
        return [state], _LEAF
    return tree_flatten(state)


def unflatten(leaves: list[Tensor], structure: TreeSpec) -> State:
    """Put a state together again."""
    if structure is _LEAF:
        (state,) = leaves
        return state
    return tree_unflatten(leaves, structure)


def ordinary(x: Tensor) -> Tensor:
    """Return a tensor that autograd can save: a copy of one that inference mode has made."""
    # The compiler does not know of inference mode.
    return x.clone() if not torch.compiler.is_compiling() and x.is_inference() else x
