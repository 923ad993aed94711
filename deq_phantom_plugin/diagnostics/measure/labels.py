"""What a strategy is called in tables and figures."""

from __future__ import annotations

import dataclasses

from ...contract.strategy import GradStrategy
from ...strategies.registry import Spec, strategy_class


def label(spec: Spec, strategy: GradStrategy) -> str:
    """Return a spec as its user typed it; of an object, what one would type.

    Args:
        spec: what was asked for.
        strategy: what it stands for.
    """
    return spec.strip() if isinstance(spec, str) else _without_defaults(strategy)


def _without_defaults(strategy: GradStrategy) -> str:
    """Return the shortest spec that parses back to a strategy: "ift", "ift(tol=1e-09)"."""
    plain = type(strategy).__repr__ is GradStrategy.__repr__
    if not (plain and dataclasses.is_dataclass(strategy) and _has_a_name(strategy)):
        return repr(strategy)
    given = []
    for field in dataclasses.fields(strategy):
        value = getattr(strategy, field.name)
        if field.init and repr(value) != repr(_default(field)):
            given.append(f"{field.name}={value!r}")
    return f"{strategy.name}({', '.join(given)})" if given else strategy.name


def _has_a_name(strategy: GradStrategy) -> bool:
    try:
        return strategy_class(strategy.name) is type(strategy)
    except ValueError:
        return False


def _default(field: dataclasses.Field[object]) -> object:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
