"""What `auto` chooses among, and how good each of them is for the gradient that came in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .._plumbing.precision import AutocastState
from .._plumbing.trial import Trial
from ..adjoint import KrylovSpace, Packing
from ..adjoint.krylov import LENGTH
from ..adjoint.probe import CountedPasses, with_probe
from ..contract.errors import NonFiniteError
from ..contract.state import State, flatten
from ..contract.strategy import Context, GradStrategy
from .ift import IFT

LAMS = tuple(round(1 - 0.1 * i, 1) for i in range(10))
"""Damping factors that are looked at."""

MARGIN = 1.2
"""What 1 - mu of each eigenvalue mu of J may grow by until the map damped by a candidate's factor
no longer contracts: spectra move from one measurement to the next."""

LONGEST = 2.0
"""Times the reference's length that a series may have in any sample: g = (I - B^k) g*, and where an
eigenvalue b of B is inside the unit circle, |1 - b^k| is at most 2."""

BACKWARD = 2
"""Evaluations of F that a backward pass through F counts as: it multiplies with the weights twice,
for the state and for the weights, where an evaluation does once."""

_TOLS = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 1e-3)  # of looser solves
_FEWEST = 3  # products for a solve that deserves the name, besides the one to the parameters
_LONG = 10  # products of GMRES after which it takes one more, to measure rounding


class Method(NamedTuple):
    """A gradient that can be chosen.

    Attributes:
        spec: of the strategy.
        unrolls: whether it goes on from the state, as `upg` does.
        lam: of a series of more than one term, which is to contract; None for others.
    """

    spec: str
    unrolls: bool
    lam: float | None = None


@dataclass(frozen=True)
class Candidate:
    """A method, judged.

    Attributes:
        spec: of the strategy.
        unrolls: whether it goes on from the state, as `upg` does.
        cosine: of its g to the reference's that at least 90 % of the samples reach.
        evaluations: of F.
        products: backward passes through F, the one that reaches the parameters included.
        lam: see `Method`.
    """

    spec: str
    unrolls: bool
    cosine: float
    evaluations: float
    products: float
    lam: float | None = None

    @property
    def cost(self) -> float:
        """What it takes, in evaluations of F."""
        return self.evaluations + BACKWARD * self.products


class Judged(NamedTuple):
    """What was found of methods.

    Attributes:
        methods: the methods.
        numbers: a row a method: low cosine, evaluations, products; shape (n, 3).
        most: the terms with each of `LAMS` up to which a series is within `LONGEST`.
    """

    methods: Sequence[Method]
    numbers: Tensor
    most: Tensor = torch.full((len(LAMS),), LENGTH, dtype=torch.float64, device="cpu")


def low(cosines: Tensor) -> Tensor:
    """Return what at least 90 % of the samples reach; they are the last dimension."""
    ordered = torch.nan_to_num(cosines, nan=-1.0).sort(dim=-1).values
    return ordered[..., ordered.shape[-1] // 10]


@cache
def built_in(budget: int | None) -> tuple[Method, ...]:
    """Return the methods that can be read off a Krylov space; `ift` is the last.

    Args:
        budget: the most products that a solve may take, None for its own limit.
    """
    limit = "" if budget is None else f", max_iter={max(1, budget - 1)}"
    return (
        Method("jfb", False),
        *(
            Method(f"npg(k={k}, lam={lam})", False, lam)
            for lam in LAMS
            for k in range(2, LENGTH + 1)
        ),
        Method("upg(k=1, lam=1.0)", True),
        *(
            Method(f"upg(k={k}, lam={lam})", True, lam)
            for lam in LAMS
            for k in range(2, LENGTH + 1)
        ),
        *(Method(f"ift(tol={tol}{limit})", False) for tol in _TOLS),
        Method("ift" if budget is None else f"ift(max_iter={max(1, budget - 1)})", False),
    )


def from_space(space: KrylovSpace, tol: float, budget: int | None) -> Judged:
    """Judge the built-in methods by what lies in a Krylov space; no product is taken.

    Args:
        space: of the reference, with samples that are usable.
        tol: of the reference.
        budget: see `built_in`.
    """
    cosines, lengths = space.series(LAMS, LENGTH)
    series = low(cosines)
    bounded = (lengths[:, 1:] <= LONGEST).all(dim=-1)  # one term is v, whatever J is
    most = 1 + bounded.cumprod(dim=1).sum(dim=1).double()
    terms = torch.arange(2, LENGTH + 1, dtype=torch.float64, device="cpu").repeat(len(LAMS))
    one = torch.ones(1, dtype=torch.float64, device="cpu")
    rows = [
        (series[0, :1], one, one),
        (series[:, 1:].flatten(), torch.ones_like(terms), terms),
        (series[0, :1], one, one),
        (series[:, 1:].flatten(), terms, terms),
    ]
    head = torch.cat([torch.stack(columns, dim=1) for columns in rows])
    numbers = torch.cat([head, _solves(space, [*_TOLS, tol], budget)])
    return Judged(built_in(budget), numbers, most)


def _solves(space: KrylovSpace, tols: Sequence[float], budget: int | None) -> Tensor:
    """Return the numbers of looser solves, a row each, as `gmres` does them.

    Of those that stop above their tolerance, and warn, the last alone is judged: it is what acts
    where nothing else is good enough, and often the best that there is for a budget.
    """
    limit = IFT.max_iter if budget is None else max(1, budget - 1)
    length = min(LENGTH, limit - 1, space.columns)  # vectors; one product tells the true residual
    measures = length > _LONG + 1  # rounding, by a product more
    most = min(length, limit - 1 - measures)
    found = []
    for tol in tols:
        steps = int(space.steps_to(tol)[space.usable].max())
        products: float = steps + 2 + (measures and steps > _LONG)  # the last is the parameters'
        if bool(space.goes_again(tol)[space.usable].any()):
            products += 2  # a vector more, and its residual
        reached = steps <= most and products <= limit + 1
        if not (reached and bool((space.gap[space.usable] < tol).all())):
            reached, products = False, limit + 1
        cosine = -1.0
        if reached or tol == tols[-1]:
            cosine = float(low(space.iterate_cosines(tol, most)))
        elif budget is not None:
            products = math.inf
        if budget is not None and budget <= _FEWEST:
            products = math.inf
        found.append([cosine, 1.0, products])
    return torch.tensor(found, dtype=torch.float64, device="cpu")


class Runs:
    """Judges strategies by running them: whatever they do, g is read off a probe.

    Costs what they cost, and leaves no trace in F's buffers, random state or the memory.

    Args:
        strategies: the methods.
        func: F.
        equilibrium: h*, detached.
        context: what they may know.

    Attributes:
        strategies: as they were given.
    """

    def __init__(
        self,
        strategies: Sequence[GradStrategy],
        func: Callable[[State], State],
        equilibrium: State,
        context: Context,
    ) -> None:
        self.strategies, self._func, self._equilibrium = strategies, func, equilibrium
        self._context = replace(
            context,
            step=context.current_step,
            total=context.current_total,
            place=context.current_place,
            memory=None,
            monitor=None,
            on_failure=None,
        )
        self._autocast = AutocastState(flatten(equilibrium)[0])

    def __call__(self, v: Sequence[Tensor], g: Sequence[Tensor], usable: Tensor) -> Judged:
        """Judge them for a gradient that came in.

        Args:
            v: its leaves.
            g: those of the reference.
            usable: the samples that count, shape (B,).

        Raises:
            RuntimeError: if one of them cannot be run here.
        """
        packing = Packing(v, self._context.sample_dim)
        reference = packing.pack(g)[usable.to(packing.device)].double()
        numbers = []
        for strategy in self.strategies:
            try:
                own, counted = self._run(strategy, v)
                if not bool(usable.any()):  # for the sake of other processes
                    numbers.append([0.0, 0.0, 0.0])
                    continue
                rows = packing.pack(own)[usable.to(packing.device)].double()
                cosine = low(_cosines(rows, reference))
                found = [float(cosine), counted.n_evaluations, counted.n_vjp]
            except NonFiniteError:  # a solve that makes a NaN: no gradient to choose
                found = [-1.0, math.inf, math.inf]
            except Exception as error:
                raise RuntimeError(
                    f"auto(methods=...): {strategy!r} cannot be measured beside the others here: "
                    f"{type(error).__name__}: {error}. Mend it, or leave it out of `methods`"
                ) from error
            numbers.append(found)
        return Judged(
            described(self.strategies), torch.tensor(numbers, dtype=torch.float64, device="cpu")
        )

    def _run(
        self, strategy: GradStrategy, v: Sequence[Tensor]
    ) -> tuple[list[Tensor], CountedPasses]:
        with Trial(self._equilibrium), self._autocast(), torch.enable_grad():
            probed, probes = with_probe(self._func, self._equilibrium)
            counted = CountedPasses(probed)
            acting = strategy.resolve(self._context)
            attached = flatten(acting.attach(counted, self._equilibrium, self._context))[0]
            found = torch.autograd.grad(
                attached, probes, list(v), allow_unused=True, materialize_grads=True
            )
        return list(found), counted


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosines of rows, of any size: squares of huge or tiny numbers are none."""
    tiny = torch.finfo(a.dtype).tiny
    a, b = (x / x.abs().amax(dim=1, keepdim=True).clamp(min=tiny) for x in (a, b))
    return torch.cosine_similarity(a, b, dim=1, eps=tiny)


def described(strategies: Sequence[GradStrategy]) -> tuple[Method, ...]:
    """Return strategies as methods."""
    return tuple(Method(repr(s), s.hands_out_states) for s in strategies)
