"""NPG: the Neumann-series-based phantom gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adjoint import Linearization
from ..state import State, flatten
from ..strategy import BackwardStats, Context, GradStrategy
from .arguments import damping_factor, positive_int
from .damping import damping


@dataclass(frozen=True, repr=False)
class NPG(GradStrategy):
    """The Neumann series cut after k terms: g = lam * sum_{t<k} (lam J^T + (1 - lam) I)^t v.

    Algorithms 2 and 3 of the supplement of "On Training Implicit Models" (Geng et al., NeurIPS
    2021), with lam counted once as in eq. A-14 (the algorithms' `lambda * grad(f, z, g)` holds it
    twice, since f does already). At an equilibrium it equals UPG with the same k and lam. The value
    is the equilibrium itself, in a tensor of its own.

    Costs one evaluation of F, k - 1 vector-Jacobian products and one backward pass on the one
    graph that memory holds, however large k.

    Args:
        k: the number of terms.
        lam: the damping factor in (0, 1], or "adaptive" for min(1, 1/rho(J)) (supplement 4.3),
            measured for each sample in backward with 10 vector-Jacobian products.

    Raises:
        ValueError: if an argument is out of range.
    """

    k: int = 5
    lam: float | str = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", positive_int("k", self.k))
        object.__setattr__(self, "lam", damping_factor(self.lam))

    @property
    def tells_samples_apart(self) -> bool:
        """Only to measure a radius for each sample."""
        return self.lam == "adaptive"

    @property
    def steps_ahead(self) -> int:
        """None: the value is the equilibrium itself."""
        return 0

    def attach(self, func: Callable[[State], State], equilibrium: State, context: Context) -> State:
        """See `GradStrategy.attach`."""
        graph = Linearization(func, equilibrium)
        batch_dim, monitor = context.batch_dim, context.monitor

        def adjoint(v: list[Tensor]) -> list[Tensor]:
            g = neumann(graph, v, self.k, self.lam, batch_dim)
            if monitor is not None:
                monitor(BackwardStats(strategy=repr(self), n_vjp=self.k - 1))
            return g

        return graph.attach(flatten(equilibrium)[0], adjoint)


def neumann(
    graph: Linearization,
    v: list[Tensor],
    k: int,
    lam: float | str,
    batch_dim: int | None,
    weight: float = 1.0,
) -> list[Tensor]:
    """Return lam * sum_{t<k} (weight * B)^t v with B = lam J^T + (1 - lam) I, by Horner's rule.

    Args:
        graph: F at the equilibrium.
        v: the incoming gradient, a tensor a leaf.
        k: the number of terms.
        lam: the damping factor, "adaptive" to measure it.
        batch_dim: see `Context.batch_dim`.
        weight: what each term weighs relative to the one before.
    """
    factors: Sequence[float | Tensor]
    factors = damping(graph, batch_dim) if isinstance(lam, str) else [lam] * len(v)
    g = v
    for _ in range(k - 1):
        image = graph.vjp(g)
        g = [
            torch.add(vi, torch.lerp(gi, ji, factor), alpha=weight)
            for vi, gi, ji, factor in zip(v, g, image, factors, strict=True)
        ]
    return [factor * gi for factor, gi in zip(factors, g, strict=True)]
