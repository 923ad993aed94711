"""The registry of hosts: finds them by name, enables and disables them, asks them for equilibria.

Hosts come from entry points (group `deq_phantom_plugin.hosts`) and from `register_host`.
"""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from .._plumbing import entry_points
from .._plumbing.hints import hint, listed
from .._plumbing.once import warn
from ..contract.memory import Memory
from .host import Host

_H = TypeVar("_H", bound=Host | type[Host])

_hosts: dict[str, Host] = {}
_warned: set[str] = set()
# Only one thread at a time hooks or restores. Reentrant: loading a package may enable a host.
_lock = threading.RLock()


def enable(host: str | None = None, *, force: bool = False) -> list[str]:
    """Make installed frameworks take strategies by name. A second call changes nothing.

    If a framework has a version that its host was not tested with, a warning is given once, and the
    framework is not changed.

    Args:
        host: the framework's name; None for all that are installed.
        force: whether to hook unknown versions as well.

    Returns:
        The names of the hosts that are enabled now.

    Raises:
        ValueError: if there is no host of that name.
        ImportError: if the named framework cannot be imported, or is not installed. In the second
            case the message gives the pip command.
    """
    with _lock:
        if host is None:
            for candidate in _all().values():
                if candidate.installed():
                    try:
                        _enable(candidate, force)
                    except Exception as error:  # a broken framework must not break the others
                        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
                        why = candidate.why_broken() or f"{kind}{error}"
                        warn(f"{candidate.name} is not hooked: {why}")
        else:
            chosen = _get(host)
            if not chosen.installed():
                raise ImportError(f"{host} is not installed: pip install {chosen.pip}")
            # Most frameworks are hooked at their first import. One that is asked for by name is
            # needed, so an import that fails is an error now.
            if why := chosen.why_broken():
                raise ImportError(f"{host} is not hooked: {why}")
            _enable(chosen, force)
        return sorted(name for name, known in _hosts.items() if known.is_enabled)


def _enable(host: Host, force: bool) -> None:
    if force or host.is_enabled or host.is_known_version:
        host.enable()
    elif host.name not in _warned:
        _warned.add(host.name)
        warn(
            f"{host.distribution or host.package} {host.version() or 'of unknown version'} is not "
            f"hooked: this package knows {', '.join(host.known_versions)}, and another version may "
            f"compute other things. Install one of these, or hook it untested by "
            f"dpp.enable({host.name!r}, force=True)",
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
    """Enable hosts inside a `with` block; hosts that were enabled before stay so at its end."""
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
    """Register a host under its name without an entry point, as in a notebook or a script.

    Args:
        host: a subclass of `Host`, or an object of such a class. The function also works as a
            decorator of the class.
        replace: whether the host may take a name that is known already. The host that had the name
            is then disabled.

    Returns:
        `host`, as given.

    Raises:
        ValueError: if the host's name is taken, or is no lower-case identifier.
        TypeError: if `host` is no host, or its class lacks a method.
    """
    cls: Any = host if isinstance(host, type) else type(host)
    if not issubclass(cls, Host):
        raise TypeError(
            f"{host!r:.80} is no host; expected a subclass of deq_phantom_plugin.hosts.Host or "
            "PatchingHost, or an object of one"
        )
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise TypeError(f"the host {cls.__qualname__} lacks {missing}; define these methods")
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
    """Return a message that a model has no equilibrium, with what would count as one."""
    frameworks = ", ".join(name for name in host_names() if name != "own")
    text = (
        f"no equilibrium found inside {type(module).__name__}; looked for dpp.Equilibrium, those "
        f"of patched repositories, and those of {frameworks}."
    )
    if any(isinstance(child, Memory) for child in module.modules()):
        text += (
            " It has a dpp.Memory. A solve of your own that ends in dpp.attach is not found: its "
            "strategy is the one that you pass there. Solve through a dpp.Equilibrium instead, and "
            "it is found."
        )
    return text


def find_equilibria(module: nn.Module) -> list[tuple[Host, nn.Module]]:
    """Return every equilibrium inside a module, each with the host that knows it."""
    hosts = [host for host in _all().values() if host.installed()]
    return [
        (host, child) for child in module.modules() for host in hosts if host.is_equilibrium(child)
    ]


def host_names() -> list[str]:
    """Return the names of the hosts whose frameworks are installed."""
    return list(_installed())


def broken_hosts() -> dict[str, str]:
    """Import every installed framework; return the reason for each host where that fails."""
    return {name: why for name, host in _installed().items() if (why := host.why_broken())}


def host_versions() -> dict[str, tuple[str, bool]]:
    """Return the version of each installed framework, and whether the host was tested with it."""
    return {
        name: (host.version() or "", host.is_known_version)
        for name, host in _installed().items()
        if host.known_versions
    }


def _installed() -> dict[str, Host]:
    """Return the hosts whose frameworks are installed, sorted by name."""
    return {name: host for name, host in sorted(_all().items()) if host.installed()}


def _all() -> dict[str, Host]:
    """Return all hosts by name, after loading every entry point; warn of broken ones."""
    with _lock:
        for name, loaded in entry_points.load_working(entry_points.HOSTS).items():
            if name not in _hosts:
                try:
                    _hosts[name] = _made(name, loaded)
                except ImportError as error:
                    warn(str(error))
        return dict(_hosts)


def _get(name: str) -> Host:
    """Return the host of a name; load its entry point if need be."""
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
    """Return an object of the host class that an entry point stands for.

    Raises:
        ImportError: if the entry point stands for something else, or the class cannot be called.
    """
    if not (isinstance(loaded, type) and issubclass(loaded, Host)):
        raise ImportError(
            f"the entry point {name} in {entry_points.HOSTS!r}: {loaded!r} is no Host; expected a "
            "subclass of deq_phantom_plugin.hosts.Host"
        )
    try:
        return loaded()
    except Exception as error:  # a foreign package may raise anything
        raise ImportError(
            f"the entry point {name} in {entry_points.HOSTS!r} is broken: "
            f"{type(error).__name__}: {error}"
        ) from error
