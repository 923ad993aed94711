"""The g of any strategy's gradient (dF/dz)^T g, read off a probe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..contract.state import State, flatten, unflatten


def with_probe(
    func: Callable[[State], State], equilibrium: State
) -> tuple[Callable[[State], State], list[Tensor]]:
    """Return F + e and the leaves of e, which are zero and require grad.

    A strategy returns (dF/dz)^T g for whatever F depends on. Let F + e take the place of F. Since
    d(F + e)/de is the identity, the gradient of e is g itself. So nothing has to be known about the
    strategy.

    Args:
        func: F, from a state to a state of the same structure.
        equilibrium: h*, whose shapes e gets.
    """
    leaves, _ = flatten(equilibrium)
    probes = [torch.zeros_like(leaf, requires_grad=True) for leaf in leaves]

    def probed(state: State) -> State:
        outputs, structure = flatten(func(state))
        return unflatten(
            [output + probe for output, probe in zip(outputs, probes, strict=True)], structure
        )

    return probed, probes


class CountedPasses:
    """F, whose evaluations and backward passes are counted.

    Args:
        func: F.

    Attributes:
        n_evaluations: the number of calls of F.
        n_vjp: the number of backward passes through F, with the one that reaches the parameters.
    """

    def __init__(self, func: Callable[[State], State]) -> None:
        self._func = func
        self.n_evaluations = self.n_vjp = 0

    def __call__(self, state: State) -> State:
        """Evaluate F."""
        self.n_evaluations += 1
        leaves, structure = flatten(self._func(state))
        # Views, since a hook on a tensor that F returns as it is, such as a parameter, would stay.
        leaves = [x.view_as(x) if isinstance(x, Tensor) and x.requires_grad else x for x in leaves]
        outputs = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        if outputs:
            torch.autograd.graph.register_multi_grad_hook(outputs, self._count, mode="any")
        return unflatten(leaves, structure)

    def _count(self, grad: Any) -> None:
        self.n_vjp += 1
