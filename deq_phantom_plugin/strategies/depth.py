"""A number of evaluations that is drawn for each training step, as models of random depth have it.

    'uniform(1, 6)'                             each of 1 ... 6 (S-JFB)
    'poisson(8)'                                Poisson of mean 8, a zero counted as one
    'lognormal_poisson(mean=32, sigma=0.5)'     Huginn's: 1 + Poisson(r), where r is log-normal of
                                                mean 32, log r of deviation sigma

A draw depends on four things alone: the seed, the training step, the equilibrium's place in its
model, and the argument that it is for. So all calls in a step have the same draw, and so have all
processes. A run that was resumed goes on with the same draws. In evaluation mode nothing is drawn.
"""

from __future__ import annotations

import ast
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch

from .._plumbing.compilation import never_compiled
from .._plumbing.hints import hint, listed
from ..contract.strategy import Context
from .arguments import boolean, positive_float, positive_int, whole_number
from .registry import parse_spec
from .told import told_call, told_place, told_step

_LARGEST_MEAN, _LARGEST_SIGMA = 10_000, 3
_OPTIONS = {"seed": 0, "per_call": False, "per_process": False}
_ARGUMENTS = {
    "uniform": ("low", "high"),
    "poisson": ("mean",),
    "lognormal_poisson": ("mean", "sigma"),
}


@dataclass(frozen=True, repr=False)
class Depth:
    """A distribution of the number of evaluations, which is at least 1.

    Attributes:
        kind: the name of the distribution: "uniform", "poisson" or "lognormal_poisson".
        arguments: its arguments, in the order in which the string has them.
        seed: the seed of the draws.
        per_call: whether each call of a step draws a number of its own. It is refused under
            activation checkpointing.
        per_process: whether each process draws a number of its own.

    Raises:
        ValueError: if there is no such distribution, or an argument is out of range.
    """

    kind: str
    arguments: tuple[float, ...]
    seed: int = 0
    per_call: bool = False
    per_process: bool = False

    def __post_init__(self) -> None:
        if self.kind not in _ARGUMENTS:
            near = hint(self.kind, _ARGUMENTS)
            raise ValueError(f"no distribution {self.kind!r}{near}; there are {listed(_ARGUMENTS)}")
        names = _ARGUMENTS[self.kind]
        if len(self.arguments) != len(names):
            raise ValueError(f"{self.kind} takes {', '.join(names)}, and nothing else by position")
        check: Callable[[str, Any], float]
        check = positive_int if self.kind == "uniform" else positive_float
        numbers = tuple(check(*named) for named in zip(names, self.arguments, strict=True))
        if self.kind == "uniform" and numbers[1] < numbers[0]:
            raise ValueError(f"high={numbers[1]} is below low={numbers[0]}; expected low <= high")
        if self.kind != "uniform" and numbers[0] > _LARGEST_MEAN:
            raise ValueError(f"mean={numbers[0]!r}; expected at most {_LARGEST_MEAN}")
        if self.kind == "lognormal_poisson" and numbers[1] > _LARGEST_SIGMA:
            raise ValueError(f"sigma={numbers[1]!r}; expected at most {_LARGEST_SIGMA}")
        object.__setattr__(self, "arguments", numbers)
        object.__setattr__(self, "seed", whole_number("seed", self.seed))
        boolean("per_call", self.per_call)
        boolean("per_process", self.per_process)

    @property
    def typical(self) -> int:
        """The number that evaluation takes: the mean, rounded, as the string names it."""
        if self.kind == "uniform":
            return max(1, round(sum(self.arguments) / 2))
        return max(1, round(self.arguments[0]))

    @never_compiled  # or for each step anew
    def draw(self, context: Context, name: str = "steps") -> int:
        """Return the number of the current step; in evaluation mode `typical`.

        Args:
            context: the context, with a memory that knows the step and the equilibrium's place.
            name: the argument that the number is for. A loop draws its length and its k apart.

        Warns:
            AssumptionWarning: once, if nobody has told the step, which is then taken to be 0; or
                if the step is known, and the place is not.

        Raises:
            RuntimeError: with `per_call`, if a backward pass calls again (activation
                checkpointing): nobody knows which of the calls it repeats.
        """
        if context.memory is not None and not context.memory.training:
            return self.typical
        key = [self.seed, told_step(context, repr(self)), told_place(context, repr(self)), name]
        if self.per_call:
            key.append(told_call(context, repr(self)))
        if self.per_process and torch.distributed.is_available():
            ready = torch.distributed.is_initialized()
            key.append(torch.distributed.get_rank() if ready else 0)
        return self.of(_uniform(" ".join(map(str, key))))

    def of(self, uniform: Iterator[float]) -> int:
        """Return the number that draws from (0, 1) make.

        It is found by inversion of the distribution, so that all processors find the same.

        Args:
            uniform: independent draws from (0, 1).
        """
        if self.kind == "uniform":
            low, high = map(int, self.arguments)
            return low + int(next(uniform) * (high - low + 1))
        if self.kind == "poisson":
            return max(1, _poisson(self.arguments[0], next(uniform)))
        mean, sigma = self.arguments
        rate = math.exp(NormalDist(math.log(mean) - sigma**2 / 2, sigma).inv_cdf(next(uniform)))
        return 1 + _poisson(rate, next(uniform))

    def __str__(self) -> str:
        names = _ARGUMENTS[self.kind] if self.kind == "lognormal_poisson" else None
        shown = [f"{a!r}" if names is None else f"{n}={a!r}" for n, a in self._named()]
        shown += [
            f"{name}={getattr(self, name)!r}"
            for name, default in _OPTIONS.items()
            if getattr(self, name) != default
        ]
        return f"{self.kind}({', '.join(shown)})"

    def __repr__(self) -> str:
        return repr(str(self))  # as it stands in a spec

    def _named(self) -> Iterator[tuple[str, float]]:
        return zip(_ARGUMENTS[self.kind], self.arguments, strict=True)


def number_or_depth(name: str, value: Any) -> int | Depth:
    """Return a number of evaluations, or the distribution that a string describes.

    Raises:
        ValueError: if it is neither; says what is accepted.
    """
    if isinstance(value, Depth):
        return value
    if not isinstance(value, str):
        return positive_int(name, value)
    try:
        return _parsed(value)
    except ValueError as error:
        raise ValueError(
            f"{name}={value!r}; expected a whole number of at least 1, or a distribution such as "
            f"'uniform(1, 6)', 'poisson(8)' or 'lognormal_poisson(mean=32, sigma=0.5)' ({error})"
        ) from None


def drawn(name: str, value: int | Depth | str) -> int:
    """Return `value` if it is a number.

    Raises:
        ValueError: if it is a distribution, from which nothing has been drawn.
    """
    if not isinstance(value, int):
        raise ValueError(
            f"{name}={value!r} has no number until `resolve(context)` draws one, and nobody called "
            "that: call dpp.attach, or use the strategy that resolve returns"
        )
    return value


def _parsed(text: str) -> Depth:
    if not text.strip().partition("(")[0].isidentifier():
        quotes = "; leave out the quotes" if text.isdecimal() else ""
        raise ValueError(f"it does not begin with the name of a distribution{quotes}")
    try:
        ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError("it does not parse") from None
    kind, args, kwargs = parse_spec(text)
    names = _ARGUMENTS.get(kind)
    if names is None:
        return Depth(kind, ())  # which says so
    if len(args) > len(names):
        raise ValueError(f"{kind} takes {', '.join(names)}")
    given = dict(zip(names, args, strict=False))
    for key, value in kwargs.items():
        if key in given or key not in (*names, *_OPTIONS):
            raise ValueError(f"{kind} takes {', '.join((*names, *_OPTIONS))}, each once")
        given[key] = value
    options = {key: given.pop(key) for key in _OPTIONS if key in given}
    if missing := [name for name in names if name not in given]:
        raise ValueError(f"{kind} lacks {', '.join(missing)}")
    return Depth(kind, tuple(given[name] for name in names), **options)


def _uniform(key: str) -> Iterator[float]:
    """Yield numbers in (0, 1) that depend on the key alone. They are the same on every machine."""
    number = 0
    while True:
        digest = hashlib.blake2b(f"{key} {number}".encode(), digest_size=8).digest()
        yield ((int.from_bytes(digest, "big") >> 12) + 0.5) / 2**52
        number += 1


def _poisson(mean: float, u: float) -> int:
    """Return the u-quantile of the Poisson distribution."""
    if mean > 500:  # a sum would be slow. The Cornish-Fisher quantile is off by 1, in 1 of 500
        z = NormalDist().inv_cdf(u)
        return max(0, math.ceil(mean + z * math.sqrt(mean) + (z * z - 1) / 6 - 0.5))
    total, n, term = 0.0, 0, math.exp(-mean)
    while True:
        total += term
        # Past the mean a term that changes nothing ends it: rounding may hold the sum below u.
        if total >= u or (n > mean and total + term == total):
            return n
        n += 1
        term *= mean / n
