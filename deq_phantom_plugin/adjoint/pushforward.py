"""Products with the Jacobian J, for the transforms and modes of PyTorch.

A strategy's gradient is (dF/dz)^T g with g = A^T v, where A approximates (I - J)^-1. Reverse mode
takes it in backward. Inside `torch.func`, and in forward mode, there is no such moment. There a
change is attached to the value in the forward pass:

1. Let e = F(h*, z) - F(h*, z0), where z0 is the constant value of z. e is zero, and de/dz = dF/dz.
2. A e is zero too, and its derivative by z is A dF/dz. In reverse mode that maps v to
   (dF/dz)^T A^T v, the strategy's gradient. In forward mode it is the right tangent as well.
3. A is made of products with J, which are ordinary operations (`__call__`). So PyTorch
   differentiates them itself, however its transforms are nested.

e and each product have the shapes of the state, leaf by leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._plumbing.compilation import as_written
from .._plumbing.transforms import as_constants, once_differentiable
from ..contract.state import State, flatten, unflatten


class Pushforward:
    """x -> J x with J = dF/dh at h*, and the change e of the module's text.

    It is for first derivatives. A second one is refused.

    Args:
        func: the map F.
        equilibrium: h*, a constant.
        user: what asks, such as a strategy. The error of a second derivative names it.

    Attributes:
        structure: the structure of the state.
        inputs: the leaves of h*.
        outputs: the leaves of F(h*), constants.
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
        # v -> J^T v is linear. Its own transpose, x -> J x, is pulled back through it.
        zeros = [torch.zeros_like(value) for value in self.outputs]
        self._push = torch.func.vjp(self._pulled, *zeros)[1]

    def _pulled(self, *cotangents: Tensor) -> tuple[Tensor, ...]:
        images: tuple[Tensor, ...] = self._pull(cotangents, retain_graph=True)
        return images

    def __call__(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Return the leaves of J x, for the leaves of x."""
        return list(self._push(tuple(leaves), retain_graph=True))

    def attach(self, values: Sequence[Tensor], change: Sequence[Tensor]) -> State:
        """Return a state of these values whose derivative is that of `change`, A e."""
        changed = [value + by for value, by in zip(values, change, strict=True)]
        return unflatten(changed, self.structure)
