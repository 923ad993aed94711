"""NPG: the Neumann-series-based phantom gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._plumbing.transforms import in_transform
from ..adjoint import Linearization, Pushforward
from ..contract.state import State, flatten
from ..contract.strategy import BackwardStats, Context, GradStrategy
from .arguments import damping_factor, positive_int
from .damping import damping
from .registry import register_strategy


@register_strategy("npg")
@dataclass(frozen=True, repr=False)
class NPG(GradStrategy):
    """The Neumann series cut after k terms: g = lam * sum_{t<k} (lam J^T + (1 - lam) I)^t v.

    Algorithms 2 and 3 of the supplement of "On Training Implicit Models" (Geng et al., NeurIPS
    2021), with lam counted once as in eq. A-14 (the algorithms' `lambda * grad(f, z, g)` holds it
    twice, since f does already). At an equilibrium it equals UPG with the same k and lam. The value
    is the equilibrium itself, in a tensor of its own.

    Costs one evaluation of F, k - 1 vector-Jacobian products and one backward pass on the one
    graph that memory holds, however large k. Inside `torch.func` and in forward mode k - 1 products
    are taken at once, memory holds a graph of each, and the context's monitor is told nothing.

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
        batch_dim = context.sample_dim if self.tells_samples_apart else None
        if in_transform():
            return neumann_change(func, equilibrium, self, self.k, self.lam, batch_dim)
        graph = Linearization(func, equilibrium, self)
        monitor = context.monitor

        def adjoint(v: list[Tensor]) -> list[Tensor]:
            g = neumann(graph.vjp, v, self.k, damping_factors(graph, self.lam, batch_dim))
            if monitor is not None:
                monitor(BackwardStats(strategy=repr(self), n_vjp=self.k - 1))
            return g

        return graph.attach(flatten(equilibrium)[0], adjoint)


def neumann(
    product: Callable[[list[Tensor]], list[Tensor]],
    v: list[Tensor],
    k: int,
    factors: Sequence[float | Tensor],
    weight: float = 1.0,
) -> list[Tensor]:
    """Return lam * sum_{t<k} (weight * B)^t v with B = lam M + (1 - lam) I, by Horner's rule.

    Args:
        product: M, J^T for gradients and J for changes.
        v: what to begin with, a tensor a leaf.
        k: the number of terms.
        factors: lam of each leaf, see `damping_factors`.
        weight: what each term weighs relative to the one before.
    """
    g = v
    for _ in range(k - 1):
        image = product(g)
        g = [
            torch.add(vi, torch.lerp(gi, ji, factor), alpha=weight)
            for vi, gi, ji, factor in zip(v, g, image, factors, strict=True)
        ]
    return [factor * gi for factor, gi in zip(factors, g, strict=True)]


def damping_factors(
    graph: Linearization, lam: float | str, batch_dim: int | None
) -> Sequence[float | Tensor]:
    """Return lam of each leaf.

    Args:
        graph: F at the equilibrium.
        lam: the damping factor, "adaptive" to measure it.
        batch_dim: see `Context.batch_dim`.
    """
    return damping(graph, batch_dim) if isinstance(lam, str) else [lam] * len(graph.inputs)


def neumann_change(
    func: Callable[[State], State],
    equilibrium: State,
    strategy: GradStrategy,
    k: int,
    lam: float | str,
    batch_dim: int | None,
    weight: float = 1.0,
) -> State:
    """Return the equilibrium attached by `neumann`, for any transform and mode of PyTorch.

    Args:
        func: the map F.
        equilibrium: h*, constant.
        strategy: whose limits errors name.
        k: the number of terms.
        lam: the damping factor; "adaptive" is refused inside `torch.func`.
        batch_dim: see `Context.batch_dim`.
        weight: what each term weighs relative to the one before.
    """
    leaves, _ = flatten(equilibrium)
    factors: Sequence[float | Tensor] = [lam] * len(leaves)  # type: ignore[list-item]
    if isinstance(lam, str):
        factors = damping(Linearization(func, equilibrium, strategy), batch_dim)
    push = Pushforward(func, equilibrium, strategy)
    return push.attach(leaves, neumann(push, push.change, k, factors, weight))
