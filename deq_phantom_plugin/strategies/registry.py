"""Names and specs of strategies: the one place that turns them into `GradStrategy` objects."""

from __future__ import annotations

import ast
import contextlib
import contextvars
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar

from torch.serialization import add_safe_globals

from .._plumbing import entry_points
from .._plumbing.hints import hint, listed
from .._plumbing.once import warn
from ..contract.state import State
from ..contract.strategy import Context, GradStrategy

Spec: TypeAlias = str | Mapping[str, Any] | GradStrategy | type[GradStrategy] | Callable[..., State]
"""What names a strategy: "upg", "upg(k=5, lam=0.5)", {"name": "upg", "k": 5}, a `GradStrategy`, or
a callable (func, equilibrium, context) -> state."""

_S = TypeVar("_S", bound=type[GradStrategy])

_registered: dict[str, type[GradStrategy]] = {}
# Values from a host for arguments that a spec leaves out, also in specs inside that spec.
_defaults: contextvars.ContextVar[Mapping[str, Any]] = contextvars.ContextVar(
    "defaults", default=MappingProxyType({})
)
# How many specs are around this one. Every level doubles the backslashes of a `repr`.
_depth: contextvars.ContextVar[int] = contextvars.ContextVar("depth", default=0)
_DEEPEST = 10


def register_strategy(name: str, *, replace: bool = False) -> Callable[[_S], _S]:
    """Register a strategy class under a name; a decorator.

    From then on `torch.load(weights_only=True)` takes files that hold such strategies, if it takes
    the values of their arguments.

    Args:
        name: a lower-case identifier.
        replace: whether the class may take over a name that is registered already.

    Raises:
        ValueError: if the name is taken or no lower-case identifier.
        TypeError: if the decorated class is no subclass of `GradStrategy` with an `attach`.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[a-z_][a-z0-9_]*", name):
        raise ValueError(f"name={name!r}; expected a lower-case identifier such as 'my_method'")
    if name in _registered and not replace:
        raise ValueError(
            f"a strategy named {name!r} is registered already, {_registered[name].__qualname__}; "
            "pass replace=True to take its place"
        )

    def register(cls: _S) -> _S:
        if not (isinstance(cls, type) and issubclass(cls, GradStrategy)):
            raise TypeError(f"{cls!r} is not a subclass of deq_phantom_plugin.GradStrategy")
        if inspect.isabstract(cls):
            raise TypeError(
                f"{cls!r} has no method attach; expected attach(self, func, equilibrium, context)"
            )
        cls.name = name
        _registered[name] = cls
        add_safe_globals([cls])
        return cls

    return register


def list_strategies() -> list[str]:
    """Return the sorted names of all strategies: built in, registered, and from entry points.

    Entry points of the group `deq_phantom_plugin.strategies` are loaded here. A broken one is left
    out, with a warning that says why.
    """
    for name in entry_points.names(entry_points.STRATEGIES):
        try:
            strategy_class(name)
        except ImportError as error:
            warn(str(error))
    return sorted(_registered)


def strategy_class(name: str) -> type[GradStrategy]:
    """Return the class registered under a name.

    Raises:
        ValueError: if there is none. The message lists the names there are.
        ImportError: if the entry point of that name is broken.
    """
    if name not in _registered and name in entry_points.names(entry_points.STRATEGIES):
        loaded = entry_points.load(entry_points.STRATEGIES, name)
        if name not in _registered:  # loading may have run the decorator
            try:
                register_strategy(name)(loaded)
            except (TypeError, ValueError) as error:
                group = entry_points.STRATEGIES
                raise ImportError(f"the entry point {name} in {group!r}: {error}") from None
    if name not in _registered:
        valid = sorted({*_registered, *entry_points.names(entry_points.STRATEGIES)})
        raise ValueError(f"unknown strategy {name!r}{hint(name, valid)}; there are {listed(valid)}")
    return _registered[name]


def get_strategy(spec: Spec, defaults: Mapping[str, Any] | None = None) -> GradStrategy:
    """Return the strategy that a spec names.

    Arguments in a string are Python literals: parsed, never evaluated.

    Args:
        spec: "upg", "upg(k=5, lam=0.5)", {"name": "upg", "k": 5}, a `GradStrategy` (returned as
            it is), a `GradStrategy` class, or a callable with the signature of
            `GradStrategy.attach`.
        defaults: values for arguments that the spec leaves out, if the strategy has an argument of
            that name. They are for hosts, which have settings of their own.

    Raises:
        ValueError: if the spec does not parse, if it names an unknown strategy or argument, or if a
            value is out of range. The message says what is accepted.
        ImportError: if the strategy's entry point is broken.
    """
    if isinstance(spec, GradStrategy):  # at once: a compiler does not follow what is below
        return spec
    depth = _depth.get()
    token = _depth.set(depth + 1)
    try:
        if depth < _DEEPEST:
            return _strategy(spec, defaults)
    except RecursionError:  # of lists in lists
        pass
    finally:
        _depth.reset(token)
    raise ValueError(
        f"the spec is nested too deeply; expected at most {_DEEPEST} specs inside one another"
    )


def _strategy(spec: Spec, defaults: Mapping[str, Any] | None) -> GradStrategy:
    if isinstance(spec, str):
        name, args, kwargs = parse_spec(spec)
        cls = strategy_class(name)
    elif isinstance(spec, Mapping):
        kwargs = dict(spec)
        name, args = kwargs.pop("name", None), []
        if not isinstance(name, str) or not all(isinstance(key, str) for key in kwargs):
            raise ValueError(f"{spec!r} names no strategy; expected {{'name': 'upg', 'k': 5}}")
        cls = strategy_class(name)
    elif isinstance(spec, type) and issubclass(spec, GradStrategy):
        cls, args, kwargs = spec, [], {}
    elif callable(spec):
        return FunctionStrategy(spec)
    else:
        raise ValueError(
            f"{spec!r} is no spec of a strategy; expected a name such as 'upg' or "
            "'upg(k=5, lam=0.5)', a dict {'name': 'upg', 'k': 5}, a GradStrategy, or a callable "
            "(func, equilibrium, context) -> state"
        )
    return _build(cls, args, kwargs, defaults)


def parse_spec(spec: str) -> tuple[str, list[Any], dict[str, Any]]:
    """Take a string such as "upg(k=5, lam=0.5)" apart: name, positional and named arguments.

    Raises:
        ValueError: if it is not a name, or a name with literals in brackets.
    """
    expected = "expected a name, or a name with literal arguments such as 'upg(k=5, lam=0.5)'"
    spec = spec.strip()
    try:
        node = ast.parse(spec, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"the spec {spec!r} does not parse; {expected}") from None
    if isinstance(node, ast.Constant) and type(node.value) is int:
        raise ValueError(
            f"the spec {spec!r} is a number; {expected}. {spec} undamped steps, as TorchDEQ's "
            f"grad={spec}, are 'upg(k={spec}, lam=1.0)'"
        )
    if isinstance(node, ast.Name):
        return node.id, [], {}
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        raise ValueError(f"the spec {spec!r} does not parse; {expected}")
    named = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError(f"the spec {spec!r} unpacks with **; {expected}")
        if keyword.arg in named:
            raise ValueError(f"the spec {spec!r} gives {keyword.arg!r} twice; {expected}")
        named[keyword.arg] = _literal(keyword.value, spec)
    return node.func.id, [_literal(arg, spec) for arg in node.args], named


@dataclass(frozen=True)
class FunctionStrategy(GradStrategy):
    """A callable with the signature of `GradStrategy.attach`, as a strategy.

    Args:
        function: (func, equilibrium, context) -> attached state.

    Raises:
        ValueError: if it cannot be called with three arguments.
    """

    function: Callable[..., State]

    def __post_init__(self) -> None:
        with contextlib.suppress(TypeError):  # some builtins have no signature
            signature = inspect.signature(self.function)
            try:
                signature.bind(None, None, None)
            except TypeError:
                raise ValueError(
                    f"{self.function!r} takes {signature}; a strategy is called as "
                    "(func, equilibrium, context) and returns the attached state"
                ) from None

    def attach(self, func: Callable[[State], State], equilibrium: State, context: Context) -> State:
        """See `GradStrategy.attach`."""
        return self.function(func, equilibrium, context)

    def __repr__(self) -> str:
        return getattr(self.function, "__qualname__", None) or repr(self.function)


def _build(
    cls: type[GradStrategy],
    args: list[Any],
    kwargs: dict[str, Any],
    defaults: Mapping[str, Any] | None,
) -> GradStrategy:
    signature = inspect.signature(cls)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    shown = ", ".join(map(str, parameters)) or "no arguments"
    name = cls.name or cls.__name__
    for key in kwargs:
        if key not in signature.parameters:
            near = hint(key, signature.parameters)
            raise ValueError(f"{name} has no argument {key!r}{near}; it takes {shown}")
    try:
        given = signature.bind_partial(*args, **kwargs).arguments
    except TypeError as error:
        raise ValueError(f"{name}: {error}; it takes {shown}") from None
    inherited = _defaults.get() if defaults is None else defaults
    filled = {
        key: value
        for key, value in inherited.items()
        if key in signature.parameters and key not in given
    }
    try:
        signature.bind(*args, **kwargs, **filled)
    except TypeError as error:
        raise ValueError(f"{name}: {error}; it takes {shown}") from None
    token = _defaults.set(inherited)  # for specs inside this spec
    try:
        return cls(*args, **kwargs, **filled)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    finally:
        _defaults.reset(token)


def _literal(node: ast.expr, spec: str) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise ValueError(
            f"{ast.get_source_segment(spec, node)!r} in the spec {spec!r} is not a literal; "
            "arguments are parsed, never evaluated: expected numbers, strings, True, False, None, "
            "or lists and dicts of them"
        ) from None
