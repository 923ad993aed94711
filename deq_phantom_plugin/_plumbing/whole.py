"""Gathers sharded states (`DTensor`s) into whole ones, and splits whole states again.

Solvers take norms and inner products of the whole state. So they work on the whole state, which
each process holds, while F gets its shards. `Sharded` converts between the two.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .trees import State, flatten, unflatten


class Sharded:
    """Converts a sharded state to the whole one, which every process holds, and back.

    Solvers then compute what a single process would compute, and all processes decide by the same
    numbers. Both conversions are differentiable.

    Args:
        leaves: the leaves of the state. Leaves that are no `DTensor`s are never converted.
    """

    def __init__(self, leaves: Sequence[Any]) -> None:
        kind = sys.modules["torch.distributed.tensor"].DTensor
        self._kind: Any = kind
        self._specs = [
            (leaf.device_mesh, leaf.placements) if isinstance(leaf, kind) else None
            for leaf in leaves
        ]

    @classmethod
    def of(cls, state: State) -> Sharded | None:
        """Return the conversion of a state; None if no leaf is a `DTensor` or in compiled code."""
        tensors = None if torch.compiler.is_compiling() else _module()
        if tensors is None:
            return None
        leaves = flatten(state)[0]
        if not any(isinstance(leaf, tensors.DTensor) for leaf in leaves):
            return None
        return cls(leaves)

    @property
    def holders(self) -> list[tuple[int, ...]]:
        """The groups of processes that hold the leaves, by their global ranks.

        F communicates among them, even if no module of F has sharded parameters.
        """
        return sorted({tuple(sorted(s[0].mesh.flatten().tolist())) for s in self._specs if s})

    def whole(self, state: State) -> State:
        """Return the whole state, ordinary tensors, of a state that is sharded in any way."""
        leaves, structure = flatten(state)
        return unflatten([self._gathered(leaf) for leaf in leaves], structure)

    def parts(self, state: State) -> State:
        """Return a whole state as shards, placed as those of the state that this was made for."""
        leaves, structure = flatten(state)
        if len(leaves) != len(self._specs):
            return state  # the later check of F's result refuses it, with a clear message
        parts = [self._split(leaf, spec) for leaf, spec in zip(leaves, self._specs, strict=True)]
        return unflatten(parts, structure)

    def on_whole(self, func: Callable[[State], State]) -> Callable[[State], State]:
        """Return F as a map from whole states to whole states; F itself sees its shards."""

        def evaluate(state: State) -> State:
            return self.whole(func(self.parts(state)))

        evaluate.__wrapped__ = func  # type: ignore[attr-defined]
        return evaluate

    def _gathered(self, leaf: Any) -> Any:
        """Return a whole leaf, and gradients of it that are whole as well."""
        if not isinstance(leaf, self._kind):
            return leaf
        replicated = [_module().Replicate()] * leaf.device_mesh.ndim
        return leaf.redistribute(placements=replicated).to_local(grad_placements=replicated)

    def _split(self, leaf: Tensor, spec: Any) -> Any:
        """Return a leaf as a `DTensor` with a mesh and placements; as it is for a spec of None."""
        if spec is None:
            return leaf
        mesh, placements = spec
        replicated = [_module().Replicate()] * mesh.ndim
        whole = self._kind.from_local(leaf, mesh, replicated, run_check=False)
        return whole.redistribute(placements=placements)


def _module() -> Any:
    """Return PyTorch's module of `DTensor`s; None if it is not loaded, so that there are none."""
    return sys.modules.get("torch.distributed.tensor")
