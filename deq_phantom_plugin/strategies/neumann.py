"""The damped Neumann series, cut after some terms: what `npg` and `npg_rr` share.

The exact g solves (I - J^T) g = v. With a damping factor lam and B = lam J^T + (1 - lam) I:

1. I - B = lam (I - J^T). So g = lam (I - B)^-1 v.
2. Where rho(B) < 1 that is the series g = lam (v + B v + B^2 v + ...).
3. Its first k terms are k - 1 times g <- v + B g from g = v, and then lam g (Horner's rule). Each
   needs one product, J^T g, since B g = lam J^T g + (1 - lam) g.

v, g and each product have the shapes of the state, leaf by leaf. lam is a number, or per sample.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._plumbing.transforms import in_transform
from ..adjoint import Clip, Linearization, Packing, Pushforward
from ..contract.state import State, flatten
from ..contract.strategy import BackwardStats, Context, GradStrategy
from .damping import damping

Product = Callable[[list[Tensor]], list[Tensor]]
"""From the leaves of a state to those of a matrix times it."""


class Neumann(GradStrategy):
    """A strategy whose g is such a series. The value is the equilibrium itself.

    Attributes:
        lam: the damping factor; "adaptive" measures it.
        clip: the largest length of J^T g per sample, in multiples of ||v||; None for any length.
    """

    lam: float | str
    clip: float | None = None

    @abstractmethod
    def terms(self) -> tuple[int, float]:
        """Return the number of terms of one pass, and the weight of a term over the one before."""

    @property
    def tells_samples_apart(self) -> bool:
        """Only if a radius is measured, or a product is clipped, per sample."""
        return self.lam == "adaptive" or self.clip is not None

    @property
    def steps_ahead(self) -> int:
        """None: the value is the equilibrium itself."""
        return 0

    def attach(self, func: Callable[[State], State], equilibrium: State, context: Context) -> State:
        """See `GradStrategy.attach`."""
        leaves = flatten(equilibrium)[0]
        batch_dim = context.sample_dim if self.tells_samples_apart else None
        # A clipped product is not linear in v. `Linearization` below refuses it in a transform.
        if self.clip is None and in_transform():  # and in forward mode
            factors = (
                damping(Linearization(func, equilibrium, self), batch_dim)
                if isinstance(self.lam, str)
                else [self.lam] * len(leaves)
            )
            push = Pushforward(func, equilibrium, self)
            return push.attach(leaves, neumann(push, push.change, factors, *self.terms()))
        graph = Linearization(func, equilibrium, self)
        lam, monitor = self.lam, context.monitor

        def adjoint(v: list[Tensor]) -> list[Tensor]:
            factors = damping(graph, batch_dim) if isinstance(lam, str) else [lam] * len(v)
            terms, weight = self.terms()
            product: Product = graph.vjp
            clip = None
            if self.clip is not None:
                product, clip = clipped(product, v, batch_dim, self.clip)
            g = neumann(product, v, factors, terms, weight)
            if monitor is not None:
                n_clipped = 0 if clip is None else clip.n_clipped
                monitor(BackwardStats(repr(self), terms - 1, n_clipped=n_clipped))
            return g

        return graph.attach(leaves, adjoint)


def clipped(
    product: Product,
    v: list[Tensor],
    batch_dim: int | None,
    limit: float,
) -> tuple[Product, Clip]:
    """Return a product that is clipped, and the object that clips it and counts.

    Args:
        product: g -> J^T g.
        v: the gradient that came in, one tensor per leaf.
        batch_dim: see `Context.batch_dim`.
        limit: the largest length of a product, in multiples of ||v||. The norm is that of all
            leaves of a sample.
    """
    packing = Packing(v, batch_dim)
    clip = Clip(packing.pack(v), limit)
    return lambda g: packing.unpack(clip(packing.pack(product(g)))), clip


def neumann(
    product: Product,
    v: list[Tensor],
    factors: Sequence[float | Tensor],
    terms: int,
    weight: float,
) -> list[Tensor]:
    """Return lam * sum_{t<k} (weight * B)^t v with B = lam M + (1 - lam) I, by Horner's rule.

    Args:
        product: x -> M x. M is J^T for gradients, and J for changes (see `Pushforward`).
        v: the first term over lam, one tensor per leaf.
        factors: lam, one per leaf.
        terms: k.
        weight: the weight of a term over that of the one before.
    """
    g = v
    for _ in range(terms - 1):
        image = product(g)
        g = [
            torch.add(vi, torch.lerp(gi, ji, factor), alpha=weight)
            for vi, gi, ji, factor in zip(v, g, image, factors, strict=True)
        ]
    return [factor * gi for factor, gi in zip(factors, g, strict=True)]
