"""The tensors that a function captures: found, and replaced by others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .._plumbing.second_order import graph_nodes

R = TypeVar("R")


def find_captured(
    func: Callable[[], R], outputs: Callable[[R], Sequence[Tensor]], inputs: Sequence[Tensor]
) -> tuple[R, list[Tensor]]:
    """Call a function, and find the tensors that it captures and that its gradient reaches.

    Args:
        func: the function, without arguments.
        outputs: from its result to the tensors in the result.
        inputs: tensors that require grad, and that count as inputs and not as captured.

    Returns:
        The result, whose graph ends at copies of the captured tensors; and the captured tensors.

    Raises:
        ValueError: if `func` captures a tensor in a way that cannot be seen.
    """
    with _Find(inputs) as found:
        result: R = found.replaced(func())  # func may return a captured tensor as it is
    captured = []
    for leaf in _leaves_of_graph(outputs(result)):
        if id(leaf) in found.originals:
            captured.append(found.originals[id(leaf)])
        elif not any(leaf is known for known in inputs):
            raise ValueError(
                f"func uses a tensor of shape {tuple(leaf.shape)} that requires grad where PyTorch "
                "does not show it (in a custom autograd.Function, or a graph built before), so "
                "that its gradient would be lost; make it an input of an ordinary operation in func"
            )
    return result, captured


def call_with(func: Callable[[], R], replacements: Mapping[int, Tensor]) -> R:
    """Call a function with other tensors in place of those that it captures.

    Args:
        func: the function, without arguments.
        replacements: from the `id` of a captured tensor to the tensor that takes its place.

    Raises:
        RuntimeError: if `func` does not use one of the captured tensors.
    """
    with _Replace(replacements) as mode:
        result: R = mode.replaced(func())
    if mode.missed:
        raise RuntimeError(
            f"func uses other tensors in backward than in the forward pass ({len(mode.missed)} of "
            f"{len(replacements)} are not there any more); it must do the same each time. Under "
            "torch.func.functional_call take a strategy that evaluates it in the forward pass "
            "only, such as upg or npg"
        )
    return result


class _Replace(TorchFunctionMode):
    def __init__(self, replacements: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._replacements = replacements
        self._used: set[int] = set()

    @property
    def missed(self) -> set[int]:
        """The ids of the tensors that should have been replaced, and were not used."""
        return set(self._replacements) - self._used

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = self.replaced((args, kwargs or {}))
        return func(*args, **kwargs)

    def replaced(self, tree: R) -> R:
        """Return a tree of tensors with the others in place of those that it uses."""
        found = {id(tensor) for tensor in _tensors(tree)} & self._replacements.keys()
        if not found:
            return tree
        self._used |= found
        replaced: R = tree_map_only(Tensor, lambda t: self._replacements.get(id(t), t), tree)
        return replaced


class _Find(_Replace):
    """Replaces each tensor that it sees for the first time by a copy without a graph."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.originals: dict[int, Tensor] = {}  # by the id of the copy
        self._copies: dict[int, Tensor] = {}  # by the id of the original
        super().__init__(self._copies)
        # They are held, since the id of a freed tensor may be given to another one.
        self._known = {id(tensor): tensor for tensor in inputs}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        for tensor in _tensors(result):
            self._known.setdefault(id(tensor), tensor)
        return result

    def replaced(self, tree: R) -> R:
        """Return a tree of tensors, with copies of those that were not seen before."""
        # Where autograd is off, nothing is captured: the forward of a custom Function uses tensors
        # there, and its caller builds the graph.
        if torch.is_grad_enabled():
            for tensor in _tensors(tree):
                if id(tensor) not in self._known:
                    self._known[id(tensor)] = tensor
                    if tensor.requires_grad:
                        copy = tensor.detach().requires_grad_()
                        self._copies[id(tensor)] = copy
                        self.originals[id(copy)] = tensor
        return super().replaced(tree)


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _leaves_of_graph(outputs: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the tensors where a backward pass from the outputs would accumulate gradients, once."""
    ends = [node.variable for node in graph_nodes(outputs) if hasattr(node, "variable")]
    ends += [out for out in outputs if out.is_leaf and out.requires_grad]
    yield from {id(end): end for end in ends}.values()
