"""A number of evaluations that is drawn for each training step, as models of random depth have it.

    'uniform(1, 6)'                             each of 1 ... 6 (S-JFB)
    'poisson(8)'                                Poisson of mean 8, a zero counted as one
    'lognormal_poisson(mean=32, sigma=0.5)'     Huginn's: 1 + Poisson(r), where r is log-normal of
                                                mean 32, log r of deviation sigma

What is drawn depends on nothing but the seed, the training step and the equilibrium's place in its
model: all calls in a step have one draw, so have all processes, and a run that was resumed goes on
with the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch

from .._plumbing.compilation import never_compiled
from .._plumbing.hints import hint, listed
from ..contract.strategy import Context
from .arguments import boolean, positive_float, positive_int, whole_number
from .registry import parse_spec
from .told import told_step

_LARGEST_MEAN = 10_000
_OPTIONS = {"seed": 0, "per_call": False, "per_process": False}
_ARGUMENTS = {
    "uniform": ("low", "high"),
    "poisson": ("mean",),
    "lognormal_poisson": ("mean", "sigma"),
}


@dataclass(frozen=True, repr=False)
class Depth:
    """A distribution of numbers of evaluations, at least 1.

    Attributes:
        kind: its name.
        arguments: in the order of the name's.
        seed: of the draws.
        per_call: whether each call of a step draws for itself.
        per_process: whether each process does.
    """

    kind: str
    arguments: tuple[float, ...]
    seed: int = 0
    per_call: bool = False
    per_process: bool = False

    @property
    def typical(self) -> int:
        """The mean, rounded: the depth of evaluation."""
        if self.kind == "uniform":
            return max(1, round(sum(self.arguments) / 2))
        return max(1, round(self.arguments[0]))

    @never_compiled  # or for each step anew
    def draw(self, context: Context) -> int:
        """Return the number of the current step.

        Args:
            context: with a memory, which knows the step and the equilibrium's place.

        Warns:
            ConvergenceWarning: once, if nobody has told the step, which is taken to be 0.
        """
        memory = context.memory
        place = 0 if memory is None else memory.place
        key = [self.seed, told_step(context, repr(self)), place]
        if self.per_call:
            key.append(0 if memory is None else memory.number_of_call())
        if self.per_process and torch.distributed.is_available():
            ready = torch.distributed.is_initialized()
            key.append(torch.distributed.get_rank() if ready else 0)
        return self.of(_uniform(" ".join(map(str, key))))

    def of(self, uniform: Iterator[float]) -> int:
        """Return the number that numbers in (0, 1) make.

        Args:
            uniform: independent draws; by inversion, so that one processor draws as another.
        """
        if self.kind == "uniform":
            low, high = map(int, self.arguments)
            return low + int(next(uniform) * (high - low + 1))
        if self.kind == "poisson":
            return max(1, _poisson(self.arguments[0], next(uniform)))
        mean, sigma = self.arguments
        rate = math.exp(NormalDist(math.log(mean) - sigma**2 / 2, sigma).inv_cdf(next(uniform)))
        return 1 + _poisson(min(rate, 100.0 * _LARGEST_MEAN), next(uniform))

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
    """Return a number, if it is one.

    Raises:
        ValueError: of a distribution, of which nothing has been drawn.
    """
    if not isinstance(value, int):
        raise ValueError(f"{name}={value!r} is drawn in `resolve(context)`, which nobody called")
    return value


def _parsed(text: str) -> Depth:
    kind, args, kwargs = parse_spec(text)
    if kind not in _ARGUMENTS:
        raise ValueError(
            f"no distribution {kind!r}{hint(kind, _ARGUMENTS)}; there are {listed(_ARGUMENTS)}"
        )
    names = _ARGUMENTS[kind]
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
    for key, value in options.items():
        options[key] = whole_number(key, value) if key == "seed" else boolean(key, value)
    if kind == "uniform":
        low, high = (positive_int(key, given[key]) for key in names)
        if high < low:
            raise ValueError(f"high={high} is below low={low}")
        return Depth(kind, (low, high), **options)
    numbers = tuple(positive_float(key, given[key]) for key in names)
    if numbers[0] > _LARGEST_MEAN:
        raise ValueError(f"mean={given['mean']!r}; expected at most {_LARGEST_MEAN}")
    if kind == "lognormal_poisson" and numbers[1] > 3:
        raise ValueError(f"sigma={given['sigma']!r}; expected at most 3")
    return Depth(kind, numbers, **options)


def _uniform(key: str) -> Iterator[float]:
    """Yield numbers in (0, 1) that depend on the key alone, on every machine the same."""
    number = 0
    while True:
        digest = hashlib.blake2b(f"{key} {number}".encode(), digest_size=8).digest()
        yield ((int.from_bytes(digest, "big") >> 12) + 0.5) / 2**52
        number += 1


def _poisson(mean: float, u: float) -> int:
    """Return the u-quantile of the Poisson distribution."""
    if (
        mean > 500
    ):  # where a sum of so many terms is slow; the error of Cornish and Fisher is O(1/mean)
        z = NormalDist().inv_cdf(u)
        return max(0, round(mean + z * math.sqrt(mean) + (z * z - 1) / 6 - 0.5))
    total, n, term = 0.0, 0, math.exp(-mean)
    while True:
        total += term
        if total >= u or n > 20 * mean + 100:
            return n
        n += 1
        term *= mean / n
