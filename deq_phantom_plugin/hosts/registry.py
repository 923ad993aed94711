"""Which hosts there are, by name: found, enabled, disabled, and asked for a model's equilibria."""

from __future__ import annotations

import inspect
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from .._plumbing import entry_points
from .._plumbing.hints import hint, listed
from ..contract.memory import Memory
from .host import Host

_H = TypeVar("_H", bound=Host | type[Host])

_hosts: dict[str, Host] = {}
_warned: set[str] = set()
# One thread at a time hooks or restores; reentrant, since loading a package may enable a host.
_lock = threading.RLock()


def enable(host: str | None = None, *, force: bool = False) -> list[str]:
    """Make installed frameworks take strategies by name; idempotent.

    A framework of a version that its host was not tested with stays as it is, with one warning.

    Args:
        host: the framework's name; None for all that are installed.
        force: whether unknown versions are hooked all the same.

    Returns:
        The names of the hosts that are now enabled.

    Raises:
        ValueError: if there is no host of that name.
        ImportError: if the named framework is not installed, and then gives the pip command, or
            if it is and cannot be imported.
    """
    with _lock:
        if host is None:
            for candidate in _all().values():
                if candidate.installed():
                    try:
                        _enable(candidate, force)
                    except Exception as error:  # a broken one is not to break the others
                        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
                        why = candidate.why_broken() or f"{kind}{error}"
                        warnings.warn(f"{candidate.name} is not hooked: {why}", stacklevel=2)
        else:
            chosen = _get(host)
            if not chosen.installed():
                raise ImportError(f"{host} is not installed: pip install {chosen.pip}")
            # Many are hooked when they are first imported; one that is asked for by name is needed.
            if why := chosen.why_broken():
                raise ImportError(f"{host} is not hooked: {why}")
            _enable(chosen, force)
        return sorted(name for name, known in _hosts.items() if known.is_enabled)


def _enable(host: Host, force: bool) -> None:
    if force or host.is_enabled or host.is_known_version:
        host.enable()
    elif host.name not in _warned:
        _warned.add(host.name)
        warnings.warn(
            f"{host.distribution or host.package} {host.version() or 'of unknown version'} is not "
            f"hooked: this package knows {', '.join(host.known_versions)}; "
            f"dpp.enable({host.name!r}, force=True) hooks it all the same",
            stacklevel=3,
        )


def disable(host: str | None = None) -> None:
    """Restore frameworks exactly as they were; idempotent.

    Args:
        host: the framework's name; None for all.

    Raises:
        ValueError: if there is no host of that name.
    """
    with _lock:
        for chosen in list(_hosts.values()) if host is None else [_get(host)]:
            chosen.disable()


@contextmanager
def enabled(host: str | None = None) -> Iterator[None]:
    """Enable hosts for the length of a `with` block; those that were enabled before stay so."""
    with _lock:
        before = {name for name, known in _hosts.items() if known.is_enabled}
        enable(host)
        mine = [known for name, known in _hosts.items() if known.is_enabled and name not in before]
    try:
        yield
    finally:
        with _lock:
            for known in mine:
                known.disable()


def register_host(host: _H, *, replace: bool = False) -> _H:
    """Let a host be found under its name, without an entry point: in a notebook, or a script.

    Args:
        host: a subclass of `Host`, or an object of one; works as a decorator of the class.
        replace: whether it may take over a name that is known already; the host that had it is
            disabled.

    Returns:
        What was given.

    Raises:
        ValueError: if the host's name is taken or no lower-case identifier.
        TypeError: if it is no host, or its class lacks a method.
    """
    cls: Any = host if isinstance(host, type) else type(host)
    if not issubclass(cls, Host):
        raise TypeError(
            f"{host!r:.80} is no host; expected a subclass of deq_phantom_plugin.hosts.Host or "
            "PatchingHost, or an object of one"
        )
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise TypeError(f"the host {cls.__qualname__} lacks {missing}")
    name = getattr(host, "name", None)
    if not isinstance(name, str) or not re.fullmatch(r"[a-z_][a-z0-9_]*", name):
        raise ValueError(f"name={name!r}; expected a lower-case identifier such as 'my_framework'")
    with _lock:
        if not replace and name in {*_hosts, *entry_points.names(entry_points.HOSTS)}:
            raise ValueError(
                f"a host named {name!r} is known already; pass replace=True to take its place"
            )
        made: Host = cls() if isinstance(host, type) else host
        if name in _hosts:
            _hosts[name].disable()
        _hosts[name] = made
    return host


def what_is_found(module: nn.Module) -> str:
    """Return that a model has no equilibrium, and what would be one, in words."""
    frameworks = ", ".join(name for name in host_names() if name != "own")
    text = (
        f"no equilibrium found inside {type(module).__name__}; looked for dpp.Equilibrium, those "
        f"of patched repositories, and those of {frameworks}."
    )
    if any(isinstance(child, Memory) for child in module.modules()):
        text += (
            " It has a dpp.Memory: a solve of your own that ends in dpp.attach has the method that "
            "is passed there. Solve through a dpp.Equilibrium instead, and it is found."
        )
    return text


def find_equilibria(module: nn.Module) -> list[tuple[Host, nn.Module]]:
    """Return every equilibrium inside a module, with the host that knows it."""
    hosts = [host for host in _all().values() if host.installed()]
    return [
        (host, child) for child in module.modules() for host in hosts if host.is_equilibrium(child)
    ]


def host_names() -> list[str]:
    """Return the names of the hosts whose frameworks are installed."""
    return list(_installed())


def broken_hosts() -> dict[str, str]:
    """Import every host's framework that is installed; return why that fails, where it does."""
    return {name: why for name, host in _installed().items() if (why := host.why_broken())}


def host_versions() -> dict[str, tuple[str, bool]]:
    """Return each host whose framework is installed, its version, and whether that is known."""
    return {
        name: (host.version() or "", host.is_known_version)
        for name, host in _installed().items()
        if host.known_versions
    }


def _installed() -> dict[str, Host]:
    return {name: host for name, host in sorted(_all().items()) if host.installed()}


def _all() -> dict[str, Host]:
    with _lock:
        for name, loaded in entry_points.load_working(entry_points.HOSTS).items():
            if name not in _hosts:
                try:
                    _hosts[name] = _made(name, loaded)
                except ImportError as error:
                    warnings.warn(str(error), stacklevel=2)
        return dict(_hosts)


def _get(name: str) -> Host:
    if name not in _hosts:
        try:
            _hosts[name] = _made(name, entry_points.load(entry_points.HOSTS, name))
        except KeyError:
            names = sorted({*_hosts, *entry_points.names(entry_points.HOSTS)})
            raise ValueError(
                f"unknown host {name!r}{hint(name, names)}; there are {listed(names)}"
            ) from None
    return _hosts[name]


def _made(name: str, loaded: Any) -> Host:
    """Return the host that an entry point stands for.

    Raises:
        ImportError: if it stands for none.
    """
    if not (isinstance(loaded, type) and issubclass(loaded, Host)):
        raise ImportError(
            f"the entry point {name} in {entry_points.HOSTS!r}: {loaded!r} is no Host"
        )
    try:
        return loaded()
    except Exception as error:  # whatever a foreign package does
        raise ImportError(
            f"the entry point {name} in {entry_points.HOSTS!r} is broken: "
            f"{type(error).__name__}: {error}"
        ) from error
