"""Small test problems whose equilibrium and Jacobian are known.

The map is tanh(W h + u), which contracts, on a state of any structure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..attach import attach
from ..contract.strategy import Context
from ..strategies.registry import Spec

NESTINGS: list[tuple[str, int, Callable[[list[Tensor]], Any]]] = [
    ("tensor", 1, lambda x: x[0]),
    ("list", 2, list),
    ("tuple", 2, tuple),
    ("dict", 2, lambda x: {"a": x[0], "b": x[1]}),
    ("nested", 3, lambda x: {"a": (x[0],), "b": [x[1], {"c": x[2]}]}),
]
"""Structures of a state: a name, the number of leaves, and a function from the leaves to it."""


@dataclass
class Contraction:
    """A smooth map F with its equilibrium h* = F(h*), on a state of any structure.

    Attributes:
        func: F.
        state: h*.
        params: the tensors that F captures. First come the weights, which all samples share. Then
            comes the injection, with one row per sample.
    """

    func: Callable[[Any], Any]
    state: Any
    params: list[Tensor]

    @property
    def leaves(self) -> list[Tensor]:
        """The leaves of the state."""
        return tree_flatten(self.state)[0]

    def probe(self, attached: Any) -> Tensor:
        """Return a loss that weighs every element differently, and is nonlinear in each."""
        total = torch.zeros((), dtype=torch.float64)
        for leaf in tree_flatten(attached)[0]:
            weight = torch.linspace(-1, 2, max(leaf.numel(), 1), dtype=leaf.dtype)[: leaf.numel()]
            total = total + (weight.view(leaf.shape) * leaf.square()).sum()
        return total

    def gradient(self, spec: Spec, context: Context | None = None, start: Any = None) -> Tensor:
        """Return the gradient of `linear_loss` with respect to all parameters, as one vector.

        Args:
            spec: the strategy.
            context: the context for `dpp.attach`.
            start: the state to attach to; None for h*.
        """
        state = self.state if start is None else start
        return self.gradient_of(attach(self.func, state, grad=spec, context=context))

    def gradient_of(self, attached: Any) -> Tensor:
        """Return the gradient of `linear_loss` at a state that is attached already."""
        grads = torch.autograd.grad(self.linear_loss(attached), self.params)
        return torch.cat([grad.flatten() for grad in grads])

    def linear_loss(self, attached: Any) -> Tensor:
        """Return a loss that is linear in the state.

        Its gradient v does not depend on the value that a method returns, so methods can be
        compared.
        """
        weighted = [
            (torch.linspace(-1, 2, leaf.numel(), dtype=leaf.dtype).view(leaf.shape) * leaf).sum()
            for leaf in tree_flatten(attached)[0]
        ]
        return torch.stack(weighted).sum()

    def jacobian(self) -> Tensor:
        """Return dF/dh over all elements of the state, shape (outputs, inputs).

        PyTorch's own `jacobian` computes it.
        """
        leaves, structure = tree_flatten(self.state)
        sizes = [leaf.numel() for leaf in leaves]

        def flat(vector: Tensor) -> Tensor:
            parts = [
                p.view(leaf.shape) for p, leaf in zip(vector.split(sizes), leaves, strict=True)
            ]
            out = self.func(tree_unflatten(parts, structure))
            return torch.cat([leaf.flatten() for leaf in tree_flatten(out)[0]])

        point = torch.cat([leaf.flatten() for leaf in leaves])
        jacobian: Tensor = torch.autograd.functional.jacobian(flat, point)
        return jacobian


def make_equilibrium(
    shapes: list[tuple[int, ...]],
    nest: Callable[[list[Tensor]], Any] = lambda leaves: leaves[0],
    *,
    seed: int = 0,
    norm: float = 0.8,
    coupled: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Contraction:
    """Build the map tanh(W h + u) with ||W||_2 = norm, and solve for its equilibrium.

    W mixes the elements of all leaves of a sample.

    Args:
        shapes: the shapes of the leaves, with the batch first unless coupled.
        nest: a function from the leaves to the state.
        seed: the seed of the random numbers.
        norm: the norm of W, which bounds the Lipschitz constant.
        coupled: whether W also mixes samples.
        dtype: the dtype of the state and the parameters.
    """
    generator = torch.Generator().manual_seed(seed)
    batch = 1 if coupled else shapes[0][0]
    sizes = [int(torch.Size(shape).numel() / batch) for shape in shapes]
    total = sum(sizes)
    weight = torch.randn(total, total, generator=generator, dtype=torch.float64)
    weight *= norm / torch.linalg.matrix_norm(weight, 2)
    weight = weight.to(dtype).requires_grad_()
    inject = torch.randn(batch, total, generator=generator, dtype=torch.float64)
    inject = inject.to(dtype).requires_grad_()
    structure = tree_flatten(nest([torch.empty(shape) for shape in shapes]))[1]

    def func(state: Any) -> Any:
        leaves = tree_flatten(state)[0]
        rows = torch.cat([leaf.reshape(batch, -1) for leaf in leaves], dim=1)
        out = torch.tanh(rows @ weight.mT + inject)
        parts = [p.reshape(s) for p, s in zip(out.split(sizes, dim=1), shapes, strict=True)]
        return tree_unflatten(parts, structure)

    state = tree_unflatten([torch.zeros(shape, dtype=dtype) for shape in shapes], structure)
    with torch.no_grad():
        for _ in range(2000):
            state, old = func(state), state
            pairs = zip(tree_flatten(state)[0], tree_flatten(old)[0], strict=True)
            if all(torch.allclose(a, b, rtol=2 * torch.finfo(dtype).eps, atol=0) for a, b in pairs):
                break
    return Contraction(func, state, [weight, inject])
