"""Products with the Jacobian that any transform or mode of PyTorch differentiates itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._plumbing.compilation import as_written
from .._plumbing.transforms import as_constants, once_differentiable
from ..contract.state import State, flatten, unflatten


class Pushforward:
    """J = dF/dh at h*, and the change of F(h*) that its derivative by all but h* amounts to.

    A gradient (dF/dz)^T g with g = A^T v is that of A e, where e = F(h*, z) is taken for a change:
    its value is zero, and its derivative dF/dz. All operations are ordinary ones, so that reverse
    mode, forward mode and `vmap` are right, however nested; for a first derivative.

    Args:
        func: the map F.
        equilibrium: h*, constant.
        user: whose errors those of a second derivative are, such as a strategy.

    Attributes:
        structure: the structure of the state.
        inputs: the leaves of h*.
        outputs: the leaves of F(h*), constant.
        change: the leaves of e.
    """

    def __init__(self, func: Callable[[State], State], equilibrium: State, user: object) -> None:
        self.inputs, self.structure = flatten(equilibrium)
        func = as_written(func)

        def flat(*leaves: Tensor) -> tuple[Tensor, ...]:
            return tuple(flatten(func(unflatten(list(leaves), self.structure)))[0])

        found = torch.func.vjp(flat, *self.inputs)
        images, self._pull = found[0], found[1]
        self.outputs = as_constants(images)
        self.change = [
            once_differentiable(image - value, user)
            for image, value in zip(images, self.outputs, strict=True)
        ]
        # J^T v is linear in v: what is pulled back through that is pushed forward.
        zeros = [torch.zeros_like(value) for value in self.outputs]
        self._push = torch.func.vjp(self._pulled, *zeros)[1]

    def _pulled(self, *cotangents: Tensor) -> tuple[Tensor, ...]:
        images: tuple[Tensor, ...] = self._pull(cotangents, retain_graph=True)
        return images

    def __call__(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Return J times the leaves of a state."""
        return list(self._push(tuple(leaves), retain_graph=True))

    def attach(self, values: Sequence[Tensor], change: Sequence[Tensor]) -> State:
        """Return a state of these values that changes with z as the change A e does."""
        changed = [value + by for value, by in zip(values, change, strict=True)]
        return unflatten(changed, self.structure)
