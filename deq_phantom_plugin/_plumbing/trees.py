"""Takes nested states apart into leaves and a structure, and puts them together again.

It does what PyTorch's pytree functions do. A single tensor and short tuples and lists of tensors,
the most frequent states, take a shorter way.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

State: TypeAlias = Any
"""A tensor, or any nesting of tuples, lists and dicts of tensors."""

_LEAF = tree_flatten(0)[1]  # the structure of a single tensor
# The structures of tuples and lists of up to 8 tensors, and the other way round.
_ROWS = {(kind, n): tree_flatten(kind([0] * n))[1] for kind in (tuple, list) for n in range(1, 9)}
_KINDS = {id(structure): kind for (kind, _), structure in _ROWS.items()}


def flatten(state: State) -> tuple[list[Tensor], TreeSpec]:
    """Return the leaves of a state, and its structure."""
    if type(state) is Tensor:  # the frequent cases first: PyTorch's function takes longer
        return [state], _LEAF
    structure = None if torch.compiler.is_compiling() else _row(state)
    return tree_flatten(state) if structure is None else (list(state), structure)


def _row(state: State) -> TreeSpec | None:
    """Return the structure of a tuple or list of 1 to 8 tensors, None for any other state."""
    kind = type(state)
    if kind is not tuple and kind is not list:
        return None
    for leaf in state:
        if type(leaf) is not Tensor:
            return None
    return _ROWS.get((kind, len(state)))


def unflatten(leaves: list[Tensor], structure: TreeSpec) -> State:
    """Return the state that has these leaves and this structure; the inverse of `flatten`."""
    if structure is _LEAF:
        (state,) = leaves
        return state
    if not torch.compiler.is_compiling() and id(structure) in _KINDS:
        return _KINDS[id(structure)](leaves)
    return tree_unflatten(leaves, structure)


def ordinary(x: Tensor) -> Tensor:
    """Return a tensor that autograd can save: a tensor made in inference mode is copied."""
    # Compiled code does not know of inference mode.
    return x.clone() if not torch.compiler.is_compiling() and x.is_inference() else x
