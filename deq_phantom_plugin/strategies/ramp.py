"""Ramp: an argument of another strategy grows along training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from .._plumbing.compilation import never_compiled
from ..contract.state import State
from ..contract.strategy import Context, GradStrategy
from .registry import Spec, get_strategy, register_strategy
from .told import in_steps, not_resolved, told_step


@register_strategy("ramp")
@dataclass(frozen=True, repr=False)
class Ramp(GradStrategy):
    """A strategy some of whose arguments change linearly with the training step, and then stay.

    Example: `"ramp('tbptt', {'k': (2, 5)}, until=0.2)"` begins with k=2, and has k=5 after a fifth
    of training, as HRM-Text's warm-up of its backpropagation. A whole number changes when the next
    one is reached, so that each number before the last is held equally long.

    `dpp.set_step(model, step)` tells the step. If `until` is a fraction, tell the length of
    training too: `dpp.set_step(model, step, total=...)`.

    Args:
        grad: the spec of the strategy.
        arguments: name -> (first, last), for each argument that changes. It is kept as sorted
            pairs.
        until: the step at which the last values are reached; or a fraction of training in (0, 1].

    Raises:
        ValueError: if the strategy has no such argument, if an argument is no number, if one of its
            values is out of range, or if `until` is neither a step nor a fraction. In `resolve`, if
            `until` is a fraction and nobody has told the length of training.
    """

    grad: Spec
    arguments: Mapping[str, tuple[float, float]] | tuple[tuple[str, tuple[float, float]], ...]
    until: int | float = 1.0

    def __post_init__(self) -> None:
        inner = get_strategy(self.grad)
        object.__setattr__(self, "grad", inner)
        expected = "expected a dict such as {'k': (2, 5)}"
        try:
            pairs = sorted(dict(self.arguments).items())
        except (TypeError, ValueError):
            raise ValueError(f"arguments={self.arguments!r}; {expected}") from None
        if not pairs:
            raise ValueError(f"arguments={self.arguments!r} has none; {expected}")
        if not dataclasses.is_dataclass(inner):
            raise ValueError(
                f"{inner!r} is no dataclass, and ramp changes an argument of one; expected a "
                "strategy with arguments, such as 'tbptt(k=2)'"
            )
        known = {f.name for f in dataclasses.fields(inner) if f.init}
        for name, ends in pairs:
            if name not in known:
                raise ValueError(f"{inner!r} has no argument {name!r}; it has {sorted(known)}")
            if not (
                isinstance(ends, tuple | list) and len(ends) == 2 and all(map(_is_number, ends))
            ):
                raise ValueError(f"{name}={ends!r} in arguments; {expected}, of two numbers")
            if not _is_number(getattr(inner, name)):
                raise ValueError(
                    f"{name}={getattr(inner, name)!r} of {inner!r} is no number, so it cannot grow"
                )
        object.__setattr__(self, "arguments", tuple((name, tuple(ends)) for name, ends in pairs))
        object.__setattr__(self, "until", fraction_or_step("until", self.until))
        for end in (0, 1):  # checked as they were given, so that an error names that value
            dataclasses.replace(inner, **{name: ends[end] for name, ends in self._pairs})
        for end in (0, 1):
            self._at(Fraction(end))

    @never_compiled  # or for each step anew
    def resolve(self, context: Context) -> GradStrategy:
        """Return the strategy with the arguments of the current step."""
        end = in_steps(self.until, context, repr(self))
        step = told_step(context, repr(self))
        return self._at(min(Fraction(1), Fraction(step, end))).resolve(context)

    def _at(self, progress: Fraction) -> GradStrategy:
        """Return the strategy at a fraction of the way. Exact arithmetic keeps to the range."""
        values: dict[str, Any] = {}
        for name, (first, last) in self._pairs:
            way = progress * (Fraction(last) - Fraction(first))
            whole = isinstance(first, int) and isinstance(last, int)
            values[name] = first + int(way) if whole else float(Fraction(first) + way)
        return dataclasses.replace(self._strategy, **values)  # type: ignore[type-var]

    @property
    def _strategy(self) -> GradStrategy:
        assert isinstance(self.grad, GradStrategy)
        return self.grad

    @property
    def owns_solve(self) -> bool:
        """Whether the strategy does."""
        return self._strategy.owns_solve

    @property
    def wants_inverse_jacobian(self) -> bool:
        """Whether the strategy does."""
        return self._strategy.wants_inverse_jacobian

    @property
    def needs_inverse_jacobian(self) -> bool:
        """Whether the strategy does."""
        return self._strategy.needs_inverse_jacobian

    @property
    def accepts_nonfinite(self) -> bool:
        """Whether the strategy does."""
        return self._strategy.accepts_nonfinite

    @property
    def tells_samples_apart(self) -> bool:
        """Whether the strategy does."""
        return self._strategy.tells_samples_apart

    @property
    def assumes_equilibrium(self) -> bool:
        """Whether the strategy does."""
        return self._strategy.assumes_equilibrium

    @property
    def hands_out_states(self) -> bool:
        """Whether the strategy does."""
        return self._strategy.hands_out_states

    @property
    def steps_ahead(self) -> int:
        """Not known: it depends on the step.

        Raises:
            ValueError: always.
        """
        raise not_resolved(self)

    def attach(self, func: Callable[[State], State], equilibrium: State, context: Context) -> State:
        """See `GradStrategy.attach`."""
        return self.resolve(context).attach(func, equilibrium, context)

    def states(
        self, func: Callable[[State], State], equilibrium: State, context: Context
    ) -> Iterator[State]:
        """Yield the states of the strategy at the current step."""
        return self.resolve(context).states(func, equilibrium, context)

    @property
    def _pairs(self) -> tuple[tuple[str, tuple[float, float]], ...]:
        assert isinstance(self.arguments, tuple)
        return self.arguments

    def __repr__(self) -> str:
        return f"{self.name}({repr(self.grad)!r}, {dict(self._pairs)!r}, until={self.until!r})"


def fraction_or_step(name: str, value: Any) -> int | float:
    """Return a point of training: a step of at least 1, or a fraction in (0, 1].

    Raises:
        ValueError: if it is neither.
    """
    if _is_number(value) and (value >= 1 if isinstance(value, int) else 0 < value <= 1):
        number: int | float = value
        return number
    raise ValueError(
        f"{name}={value!r}; expected a step, a whole number of at least 1, or a fraction of "
        "training, a float in (0, 1]"
    )


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)
