"""NPG: the Neumann-series-based phantom gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..contract.strategy import Context, GradStrategy
from .arguments import damping_factor, positive_or_none
from .depth import Depth, drawn, number_or_depth
from .neumann import Neumann
from .registry import register_strategy


@register_strategy("npg")
@dataclass(frozen=True, repr=False)
class NPG(Neumann):
    """The Neumann series cut after k terms: g = lam * sum_{t<k} (lam J^T + (1 - lam) I)^t v.

    Source: Geng et al., "On Training Implicit Models" (NeurIPS 2021), supplement, algorithms 2 and
    3, with lam counted once, as in eq. A-14. (The algorithms' `lambda * grad(f, z, g)` counts it
    twice, since their f is damped already.) At an equilibrium it equals UPG with the same k and
    lam. The value is the equilibrium itself, in a tensor of its own.

    Costs one evaluation of F, k - 1 vector-Jacobian products and one backward pass. Memory holds
    one graph, however large k is. Inside `torch.func` and in forward mode the k - 1 products are
    taken in the forward pass, memory holds a graph of each, and the context's monitor is told
    nothing.

    Args:
        k: the number of terms, or a distribution of it, see `Depth`.
        lam: the damping factor in (0, 1]; or "adaptive" for min(1, 1/rho(J)) (supplement 4.3),
            measured per sample in backward with 10 vector-Jacobian products.
        clip: the largest length of a product J^T g, in multiples of ||v||; None, the default, does
            not clip. In each step g <- v + lam J^T g + (1 - lam) g a longer J^T g is scaled down to
            clip ||v||, before it is damped. The norm is that of all leaves of a sample, or of the
            batch where samples are coupled. So g stays bounded where rho(J) exceeds 1. It is
            another g there, and the context's monitor is told how many products were clipped.
            `npg(k=2, lam=1.0, clip=1.0)` is the `onestep` of github.com/jacobfa/Attractor
            (`_maybe_clip_jv`). A clipped product is not linear in v, so `torch.func` and forward
            mode refuse it.

    Raises:
        ValueError: if an argument is out of range.
    """

    k: int | Depth | str = 5
    lam: float | str = 0.5
    clip: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", number_or_depth("k", self.k))
        object.__setattr__(self, "lam", damping_factor(self.lam))
        object.__setattr__(self, "clip", positive_or_none("clip", self.clip))

    def resolve(self, context: Context) -> GradStrategy:
        """Return the strategy with the number of the current step, where that is drawn."""
        return replace(self, k=self.k.draw(context, "k")) if isinstance(self.k, Depth) else self

    def terms(self) -> tuple[int, float]:
        """See `Neumann.terms`."""
        return drawn("k", self.k), 1.0
