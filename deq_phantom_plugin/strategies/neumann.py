"""The damped Neumann series, cut after some terms: what `npg` and `npg_rr` share."""

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
    """A strategy whose g is such a series; the value is the equilibrium itself.

    Attributes:
        lam: the damping factor, "adaptive" to measure it.
        clip: the longest J^T g, in multiples of ||v||, for each sample; None for any length.
    """

    lam: float | str
    clip: float | None = None

    @abstractmethod
    def terms(self) -> tuple[int, float]:
        """Return the number of terms of one pass, and what each weighs relative to the last."""

    @property
    def tells_samples_apart(self) -> bool:
        """Only to measure a radius or to clip for each sample."""
        return self.lam == "adaptive" or self.clip is not None

    @property
    def steps_ahead(self) -> int:
        """None: the value is the equilibrium itself."""
        return 0

    def attach(self, func: Callable[[State], State], equilibrium: State, context: Context) -> State:
        """See `GradStrategy.attach`."""
        leaves = flatten(equilibrium)[0]
        batch_dim = context.sample_dim if self.tells_samples_apart else None
        # What is clipped is not linear in v: there it is refused, as all that is not.
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
    """Return a product that is clipped, all leaves of a sample together, and what counts.

    Args:
        product: J^T.
        v: the gradient that came in, a tensor a leaf.
        batch_dim: see `Context.batch_dim`.
        limit: the longest product, in multiples of ||v||.
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
        product: M, J^T for gradients and J for changes.
        v: what to begin with, a tensor a leaf.
        factors: lam of each leaf.
        terms: k.
        weight: what each term weighs relative to the one before.
    """
    g = v
    for _ in range(terms - 1):
        image = product(g)
        g = [
            torch.add(vi, torch.lerp(gi, ji, factor), alpha=weight)
            for vi, gi, ji, factor in zip(v, g, image, factors, strict=True)
        ]
    return [factor * gi for factor, gi in zip(factors, g, strict=True)]
