"""Hooks into installed frameworks, one file each."""

from __future__ import annotations

import difflib
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .. import entry_points
from .host import Host, PatchingHost, Solve, attach_observed, relative_residual, tell

__all__ = [
    "Host",
    "PatchingHost",
    "Solve",
    "attach_observed",
    "broken_hosts",
    "disable",
    "enable",
    "enabled",
    "find_equilibria",
    "host_names",
    "host_versions",
    "relative_residual",
    "tell",
]

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


def find_equilibria(module: nn.Module) -> list[tuple[Host, nn.Module]]:
    """Return every equilibrium inside a module, with the host that knows it."""
    hosts = [host for host in _all().values() if host.installed()]
    return [
        (host, child) for child in module.modules() for host in hosts if host.is_equilibrium(child)
    ]


def host_names() -> list[str]:
    """Return the names of the hosts whose frameworks are installed."""
    return sorted(name for name, host in _all().items() if host.installed())


def broken_hosts() -> dict[str, str]:
    """Import every host's framework that is installed; return why that fails, where it does."""
    hosts = {name: host for name, host in sorted(_all().items()) if host.installed()}
    return {name: why for name, host in hosts.items() if (why := host.why_broken())}


def host_versions() -> dict[str, tuple[str, bool]]:
    """Return each host whose framework is installed, its version, and whether that is known."""
    hosts = {name: host for name, host in sorted(_all().items()) if host.installed()}
    return {
        name: (host.version() or "", host.is_known_version)
        for name, host in hosts.items()
        if host.known_versions
    }


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
            names = entry_points.names(entry_points.HOSTS)
            near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            valid = ", ".join(repr(known) for known in names)
            raise ValueError(f"unknown host {name!r}{hint}; there are {valid}") from None
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
