"""The names of strategies in tables and figures."""

from __future__ import annotations

import dataclasses

from ...contract.strategy import GradStrategy
from ...strategies.registry import Spec, strategy_class


def label(spec: Spec, strategy: GradStrategy) -> str:
    """Return a spec as its user typed it; for an object, the spec that one would type for it.

    Args:
        spec: the spec that the user gave: a string, or an object.
        strategy: the strategy that it stands for.
    """
    return spec.strip() if isinstance(spec, str) else _without_defaults(strategy)


def _without_defaults(strategy: GradStrategy) -> str:
    """Return the shortest spec that parses back to a strategy: "ift", "ift(tol=1e-09)"."""
    if not (dataclasses.is_dataclass(strategy) and _has_a_name(strategy)):
        return repr(strategy)
    try:
        # A strategy may change its arguments when it is made, so the declared defaults do not do.
        plain = type(strategy)()
    except (TypeError, ValueError):  # an argument has no default
        return repr(strategy)
    if repr(strategy) == repr(plain):
        return strategy.name
    if type(strategy).__repr__ is not GradStrategy.__repr__:
        return repr(strategy)
    values = [(f.name, getattr(strategy, f.name)) for f in dataclasses.fields(strategy) if f.init]
    given = [f"{name}={v!r}" for name, v in values if repr(v) != repr(getattr(plain, name))]
    return f"{strategy.name}({', '.join(given)})"


def _has_a_name(strategy: GradStrategy) -> bool:
    """Whether the registry knows the strategy's class by its name."""
    try:
        return strategy_class(strategy.name) is type(strategy)
    except ValueError:
        return False
