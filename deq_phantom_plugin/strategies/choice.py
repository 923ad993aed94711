"""What `auto` decides on numbers that all processes share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .candidates import LAMS, Candidate, Judged, Method

DEFAULT_STEPS = 5
"""The k of `upg` where nothing can be judged and no budget is set: the supplement's own."""

_DAMPED = 0.5  # its damping where no factor contracts: the supplement's own
SHARE = 0.9
"""Of the samples, which have to be as a rule asks."""

# What is in force stays unless something is better by so much, or it is not good enough any more.
_SURER = 1 / 3  # of the way from `cosine` to 1
_CHEAPER = 0.9  # of the cost
_BETTER = 0.8  # of what is missing to a cosine of 1
_LEFT = 0.98  # the radius below which that is no trouble any more

OFF = "not at its equilibrium"
"""The trouble of states that are not."""

_OUTSIDE = "no damping brings the radius below 1"
_POOR = "the reference was not solved"
_NONE = "no method has"

_HEAD = 5  # numbers before the radii, see `Numbers.row`


@dataclass(frozen=True)
class Choice:
    """What was chosen at a training step, and why.

    Attributes:
        step: the training step of the measurement; the choice holds from the next one on.
        spec: of the strategy.
        cosine: of its g to the reference's, which at least 90 % of the samples reach; None where
            there was no reference to compare with.
        cost: evaluations of F that it counts as beside the solve, a backward pass as two; None
            where it was not measured.
        why: in words.
    """

    step: int
    spec: str
    cosine: float | None
    cost: float | None
    why: str

    @property
    def trouble(self) -> str:
        """The kind of trouble in which it was made, nothing if there was none."""
        kinds = (OFF, _OUTSIDE, _POOR, _NONE)
        return next((kind for kind in kinds if self.why.startswith(kind)), "")


@dataclass(frozen=True)
class Numbers:
    """What one process has measured.

    Attributes:
        judged: the methods.
        rows: the samples that it is of.
        settled: those that are at their equilibrium.
        compared: those with a reference to compare with.
        supported: those whose reference is good enough to judge by.
        radii: of the map damped by each of `LAMS`, and by `MARGIN` times each, which at least 90 %
            of the samples are below.
        broken: whether a gradient that was not finite came in.
    """

    judged: Judged
    rows: int
    settled: int
    compared: int
    supported: int
    radii: Tensor
    broken: bool

    def row(self) -> Tensor:
        """Return all numbers as one vector of float64."""
        head = [self.rows, self.settled, self.compared, self.supported, self.broken]
        parts = [
            torch.tensor(head, dtype=torch.float64, device="cpu"),
            self.radii,
            self.judged.most,
            self.judged.numbers.flatten(),
        ]
        return torch.nan_to_num(torch.cat(parts), posinf=torch.finfo(torch.float64).max)


@dataclass(frozen=True)
class Shared:
    """The same of all processes together; equal in each of them.

    Attributes:
        candidates: the methods, judged.
        rows: the samples.
        settled: the share of them that are at their equilibrium.
        supported: the share whose reference is good enough.
        radii: of the map damped by each of `LAMS`, the mean of the processes.
        steeper: by `MARGIN` times each.
        most: terms with each of `LAMS` that are not too long in any sample of any process.
        broken: whether in one of them a gradient was not finite.
    """

    candidates: Sequence[Candidate]
    rows: int
    settled: float
    supported: float
    radii: Sequence[float]
    steeper: Sequence[float]
    most: Sequence[float]
    broken: bool

    def contracts(self, method: Candidate, in_force: bool = False) -> bool:
        """Whether a series shortens what it sees in every direction, and reverses none.

        With B = lam J + (1 - lam) I, k terms make g = (I - B^k) g*: where an eigenvalue of B is
        beyond the unit circle, g may point against g* in its direction. That hardly shows in the
        cosine as long as v has little of it, and training then feeds it.

        Args:
            method: what may be one; others need not.
            in_force: whether it acts, and is to contract without a margin.
        """
        if method.lam is None:
            return True
        return (self.radii if in_force else self.steeper)[LAMS.index(method.lam)] < 1

    def is_bounded(self, method: Candidate) -> bool:
        """Whether no sample's g is so long that it could drown the others.

        Low quantiles of cosines and radii do not see the tenth in which a series grows.
        """
        return method.lam is None or method.products <= self.most[LAMS.index(method.lam)]

    def became(self, last: Choice | None) -> Candidate | None:
        """Return what was chosen, as it is now; None if that was for want of a better."""
        known = self.candidates if last is not None and not last.trouble else ()
        return next((c for c in known if last is not None and c.spec == last.spec), None)

    def has_left(self, last: Choice | None) -> bool:
        """Whether what was chosen is a series that does not contract any more, or not in all."""
        now = self.became(last)
        return now is not None and not (self.contracts(now, in_force=True) and self.is_bounded(now))


def shared(own: Numbers, device: torch.device) -> Shared:
    """Put together what all processes have measured, weighted by their samples.

    One collective of a few thousand numbers, in all processes of the default group.

    Args:
        own: of this process.
        device: of the state, where processes exchange tensors.
    """
    return together(own.judged.methods, _gathered(own.row(), device))


def together(methods: Sequence[Method], table: Tensor) -> Shared:
    """Put measurements of the same methods together, weighted by their samples.

    Args:
        methods: what was judged.
        table: a row of each measurement, see `Numbers.row`.
    """
    rows, settled, compared, supported, broken = table[:, :_HEAD].T
    bounds = _HEAD + 2 * len(LAMS)
    at = bounds + len(LAMS)
    most = table[:, at:].amax(dim=0).view(-1, 3)
    cosines = (_weights(compared) @ table[:, at:]).view(-1, 3)[:, 0]
    judged = zip(methods, cosines.tolist(), most[:, 1].tolist(), most[:, 2].tolist(), strict=True)
    radii = (_weights(rows) @ table[:, _HEAD:bounds]).tolist()
    return Shared(
        [Candidate(m.spec, m.unrolls, c, e, p, m.lam) for m, c, e, p in judged],
        int(rows.sum()),
        float(settled.sum() / rows.sum().clamp(min=1)),
        float(supported.sum() / compared.sum().clamp(min=1)),
        radii[: len(LAMS)],
        radii[len(LAMS) :],
        table[:, bounds:at].amin(dim=0).tolist(),
        bool(broken.any()),
    )


def _weights(samples: Tensor) -> Tensor:
    return samples / samples.sum().clamp(min=1)


def _gathered(numbers: Tensor, device: torch.device) -> Tensor:
    """Return the numbers of all processes, a row each, the same in all of them."""
    group = torch.distributed
    if not (group.is_available() and group.is_initialized()) or group.get_world_size() == 1:
        return numbers[None]
    table = numbers.new_zeros(group.get_world_size(), len(numbers))
    table[group.get_rank()] = numbers
    table = table.to(device)
    group.all_reduce(table)
    return table.cpu()


@dataclass(frozen=True)
class Rule:
    """Decides.

    Attributes:
        cosine: that at least 90 % of the samples are to reach, at the least cost.
        budget: the most products, in place of that: the highest cosine.
        free: whether the methods are the built-in ones, and not a user's.
    """

    cosine: float
    budget: int | None
    free: bool

    def decide(self, found: Shared, last: Choice | None, step: int) -> tuple[Choice, bool]:
        """Return the choice, and whether it is one for want of a better.

        Args:
            found: what was measured, of at least one sample.
            last: the choice that is in force.
            step: the training step.
        """
        trouble = self._trouble(found, last)
        candidates = self._possible(found, trouble, last)
        judged = found.supported >= SHARE and not trouble.startswith(OFF)
        chosen = self._chosen(candidates, last) if judged else None
        if chosen is not None:
            reason = self._reason(chosen, last) + self._before(found, last)
            why = f"{trouble}; {reason}" if trouble else reason
            return Choice(step, chosen.spec, chosen.cosine, chosen.cost, why), False
        if not trouble:
            share = f"{1 - found.supported:.0%} of the samples"
            trouble = f"{_NONE} {self._wish()}" if judged else f"{_POOR} in {share}"
        other = self._otherwise(found, trouble, last, judged)
        cosine = other.cosine if judged and other.cosine >= -1 else None
        return Choice(step, other.spec, cosine, other.cost, trouble), True

    def _possible(self, found: Shared, trouble: str, last: Choice | None) -> list[Candidate]:
        """Return the candidates that may be taken at all."""
        bounded = [c for c in found.candidates if found.is_bounded(c)]
        if trouble:
            # Of many steps the graphs are kept: for more than a solve costs nobody wants them.
            most = found.candidates[-1].cost if self.free and found.candidates else math.inf
            return [c for c in bounded if c.unrolls and c.cost <= most]
        acting = None if last is None else last.spec
        return [c for c in bounded if found.contracts(c, in_force=c.spec == acting)]

    def _trouble(self, found: Shared, last: Choice | None) -> str:
        """Return why only methods that go on from the state are right here, or nothing."""
        before = "" if last is None else last.trouble
        share = (1 + SHARE) / 2 if before == OFF else SHARE
        if found.settled < share:
            return f"{OFF} in {1 - found.settled:.0%} of the samples"
        radius = min(found.radii)
        if radius >= (_LEFT if before == _OUTSIDE else 1):
            return f"{_OUTSIDE}, the lowest is {radius:.3g}"
        return ""

    def _chosen(self, candidates: Sequence[Candidate], last: Choice | None) -> Candidate | None:
        """Return what the rule takes of candidates that are judged; what is in force if it can."""
        now = next((c for c in candidates if last is not None and c.spec == last.spec), None)
        if self.budget is not None:
            within = [c for c in candidates if c.products <= self.budget]
            if not within:
                return None
            best = max(within, key=lambda c: (c.cosine, -c.cost))
            if now is not None and now in within:
                return now if 1 - best.cosine >= _BETTER * (1 - now.cosine) else best
            return best
        enough = [c for c in candidates if c.cosine >= self.cosine]
        if now in enough and now is not None:
            surer = self.cosine + _SURER * (1 - self.cosine)
            enough = [c for c in enough if c.cosine >= surer and c.cost < _CHEAPER * now.cost]
            enough = enough or [now]
        return min(enough, key=lambda c: (c.cost, -c.cosine)) if enough else None

    def _otherwise(
        self, found: Shared, trouble: str, last: Choice | None, judged: bool
    ) -> Candidate:
        """Return what is taken where the rule has nothing to take."""
        unrolling = trouble.startswith((OFF, _OUTSIDE))
        if self.free:
            if unrolling:
                return _unrolled(found, self.budget, last)
            return found.candidates[-1]  # `ift`
        known = found.candidates
        within = [c for c in known if self.budget is None or c.products <= self.budget]
        further = [c for c in within if c.unrolls]
        if unrolling and further:  # the further it goes, the nearer it gets
            return max(further, key=lambda c: c.evaluations)
        if not within or (unrolling and not judged):
            return min(known, key=lambda c: c.products)
        return max(within, key=lambda c: c.cosine)

    def _reason(self, chosen: Candidate, last: Choice | None) -> str:
        kept = "kept, " if last is not None and chosen.spec == last.spec else ""
        if self.budget is not None:
            return f"{kept}the best with {self._wish()}"
        return f"{kept}the cheapest with {self._wish()}"

    def _before(self, found: Shared, last: Choice | None) -> str:
        """Return what has become of the choice before, where that is too little."""
        now = found.became(last)
        if now is not None and found.has_left(last):
            return f"; {now.spec} does not contract everywhere any more"
        if now is None or self.budget is not None or not -1 < now.cosine < self.cosine:
            return ""
        return f"; {now.spec} is at {now.cosine:.3f}"

    def _wish(self) -> str:
        if self.budget is not None:
            return f"at most {self.budget} products"
        return f"a cosine of at least {self.cosine:g}"


def _unrolled(found: Shared, budget: int | None, last: Choice | None) -> Candidate:
    """Return `upg` with the least damping that contracts, the supplement's if none does.

    What is in force stays as long as it does contract.
    """
    k = DEFAULT_STEPS if budget is None else budget
    # Without a margin: the values of a loop are its own where nothing is damped.
    contracting = [lam for lam, rho in zip(LAMS, found.radii, strict=True) if rho < 1]
    # Of one step the direction is the same with any.
    possible = [1.0] if k == 1 else [*contracting, _DAMPED]
    specs = [f"upg(k={k}, lam={lam})" for lam in possible]
    spec = last.spec if last is not None and last.spec in specs else specs[0]
    known = [c.cosine for c in found.candidates if c.spec == spec]
    return Candidate(spec, True, known[0] if known else -1.0, k, k)
