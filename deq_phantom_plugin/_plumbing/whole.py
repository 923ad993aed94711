"""States that are sharded over a mesh of devices (`DTensor`s), as whole ones and back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .trees import State, flatten, unflatten


class Sharded:
    """The way from a state that is sharded to the whole one, which every process holds, and back.

    Norms, inner products and small solves of the whole state are then those of one process, and
    all processes decide by the same numbers. Both ways are differentiable: a gradient that arrives
    at a shard belongs to the whole.

    Args:
        leaves: of the state; those that are no `DTensor`s stay what they are.
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
        """Return the way for a state, None where no leaf is sharded."""
        tensors = None if torch.compiler.is_compiling() else _module()
        if tensors is None:
            return None
        leaves = flatten(state)[0]
        if not any(isinstance(leaf, tensors.DTensor) for leaf in leaves):
            return None
        return cls(leaves)

    @property
    def holders(self) -> list[tuple[int, ...]]:
        """The processes that hold the leaves; F need have no module that says so."""
        return sorted({tuple(sorted(s[0].mesh.flatten().tolist())) for s in self._specs if s})

    def whole(self, state: State) -> State:
        """Return a state, sharded in whatever way, as a whole one."""
        leaves, structure = flatten(state)
        return unflatten([self._gathered(leaf) for leaf in leaves], structure)

    def parts(self, state: State) -> State:
        """Return a whole state, sharded as the first one was."""
        leaves, structure = flatten(state)
        if len(leaves) != len(self._specs):
            return state  # whoever checks states will say so
        parts = [self._split(leaf, spec) for leaf, spec in zip(leaves, self._specs, strict=True)]
        return unflatten(parts, structure)

    def on_whole(self, func: Callable[[State], State]) -> Callable[[State], State]:
        """Return F on whole states; F itself sees its shards."""

        def evaluate(state: State) -> State:
            return self.whole(func(self.parts(state)))

        evaluate.__wrapped__ = func  # type: ignore[attr-defined]
        return evaluate

    def _gathered(self, leaf: Any) -> Any:
        if not isinstance(leaf, self._kind):
            return leaf
        replicated = [_module().Replicate()] * leaf.device_mesh.ndim
        return leaf.redistribute(placements=replicated).to_local(grad_placements=replicated)

    def _split(self, leaf: Tensor, spec: Any) -> Any:
        if spec is None:
            return leaf
        mesh, placements = spec
        replicated = [_module().Replicate()] * mesh.ndim
        whole = self._kind.from_local(leaf, mesh, replicated, run_check=False)
        return whole.redistribute(placements=placements)


def _module() -> Any:
    """Return PyTorch's module of `DTensor`s, None where nobody has imported it."""
    return sys.modules.get("torch.distributed.tensor")
