"""Specs as the text that a config saves, for hosts whose gradient is that of a loop.

A spec such as "bptt" leaves open how many evaluations there are, and each loop fills in its own
number. The saved text has to leave it open too: with a number in it, it would name another method.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._plumbing.once import warn_once
from ..contract.errors import AssumptionWarning
from ..contract.strategy import GradStrategy
from ..strategies.registry import FunctionStrategy, get_strategy
from .settings import say_not_saved


def written(spec: Any, steps: int) -> str | None:
    """Return a text that names the same strategy as a spec, whatever the length of the loop.

    Args:
        spec: a valid spec, see `get_strategy`.
        steps: a length with which the spec is valid.

    Returns:
        The text; None if there is none, as for a function.
    """
    lengths = [{"steps": n} for n in (steps, steps + 1)]
    meant = [get_strategy(spec, known) for known in lengths]
    is_open = meant[0] != meant[1]
    text = _text(spec) if is_open else repr(meant[0])
    try:
        return text if [get_strategy(text, known) for known in lengths] == meant else None
    except ValueError:
        return None


def _text(spec: Any) -> str:
    """Return a spec as text, without values for the arguments that it leaves out."""
    if isinstance(spec, str):
        return spec
    if isinstance(spec, Mapping):
        given = (f"{name}={_literal(value)}" for name, value in spec.items() if name != "name")
        return f"{spec['name']}({', '.join(given)})"
    if isinstance(spec, type):
        return f"{getattr(spec, 'name', spec.__name__)}()"
    return repr(spec)


def _literal(value: Any) -> str:
    """Return an argument as text. A spec within a spec is written as a string."""
    if isinstance(value, Mapping) and "name" not in value:
        return "{" + ", ".join(f"{key!r}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if isinstance(value, tuple):
        return "(" + "".join(f"{_literal(item)}, " for item in value) + ")"
    is_spec = isinstance(value, Mapping | GradStrategy | type)
    return repr(_text(value)) if is_spec else repr(value)


def say_unwritten(spec: Any, saved: Any) -> None:
    """Warn once that a config cannot name the gradient in force.

    Args:
        spec: the gradient.
        saved: what the config names in its place; None for the model's own gradient.
    """
    if isinstance(get_strategy(spec, {"steps": 1}), FunctionStrategy):
        say_not_saved(spec, saved)
        return
    warn_once(
        "grad has no text",
        f"the gradient in force, {spec!r}, has no text that a config could save. So a model that "
        f"is loaded from a checkpoint has another one: config.grad={saved!r}. Call dpp.set_grad "
        "after loading, or register its class by dpp.register_strategy. This is said once.",
        AssumptionWarning,
    )
