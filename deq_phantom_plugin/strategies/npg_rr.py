"""NPG-RR: the whole Neumann series in expectation, cut at random."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .._plumbing.lockstep import first_of
from .arguments import damping_factor, probability
from .neumann import Neumann
from .registry import register_strategy


@register_strategy("npg_rr")
@dataclass(frozen=True, repr=False)
class NPGRR(Neumann):
    """The Neumann series cut at random and reweighted: g = lam * sum_{t<K} B^t v / p^t.

    Here B = lam J^T + (1 - lam) I as in NPG, and K is drawn with P(K > t) = p^t.

    Source: Russian roulette, Beatson & Adams 2019, "Efficient optimization of loops and limits with
    randomized telescoping sums". Mean and variance, step by step:

    1. Let x_t = lam B^t v be term t of the series. It is in the sum with probability p^t, and then
       it counts x_t / p^t.
    2. So the mean of the sum is x_0 + x_1 + x_2 + ... Where rho(B) < 1 that is (I - J^T)^-1 v, the
       exact g, for every p.
    3. The terms s and t are both in the sum with probability p^max(s,t). So the variance, of all
       elements together, is

        sum_{s,t} <x_s, x_t> (p^-min(s,t) - 1).

       It is finite where rho(B)^2 < p. Beyond that, rare passes with a large K dominate the mean.

    One K is drawn per backward pass, for the whole batch: with one per sample the batch would cost
    the largest of them. It comes from PyTorch's CPU generator, so that `torch.manual_seed`
    reproduces it and no device is waited for. Processes whose F communicates take the K of the
    first of them. The value is the equilibrium itself, in a tensor of its own.

    Costs one evaluation of F, K - 1 vector-Jacobian products (p / (1 - p) in the mean) and one
    backward pass. Memory holds one graph.

    Args:
        p: the probability of going on after each term, in (0, 1).
        lam: the damping factor in (0, 1]; or "adaptive" for min(1, 1/rho(J)) (supplement 4.3),
            measured per sample in backward with 10 vector-Jacobian products.

    Raises:
        ValueError: if an argument is out of range.
    """

    p: float = 0.9
    lam: float | str = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "p", probability("p", self.p))
        object.__setattr__(self, "lam", damping_factor(self.lam))

    def terms(self) -> tuple[int, float]:
        """See `Neumann.terms`."""
        return first_of(draw_terms(self.p)), 1 / self.p


def draw_terms(p: float) -> int:
    """Draw K = 1, 2, ... with P(K > t) = p^t."""
    with torch._C._DisableFuncTorch():  # under vmap too it is one number for all
        uniform = 1 - torch.rand((), dtype=torch.float64, device="cpu").item()  # in (0, 1]
    return 1 + int(math.log(uniform) / math.log(p))
