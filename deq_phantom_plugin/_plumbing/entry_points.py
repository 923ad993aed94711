"""Loads what other packages offer under this package's entry-point groups.

An entry point is a name in a package's metadata that stands for an object, see "Entry points" in
the Python packaging guide. Strategies, hosts and adapters are found through the groups below.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .once import warn

STRATEGIES = "deq_phantom_plugin.strategies"
HOSTS = "deq_phantom_plugin.hosts"
ADAPTERS = "deq_phantom_plugin.adapters"


def names(group: str) -> list[str]:
    """Return the sorted names in a group; nothing is imported."""
    return sorted({point.name for point in entry_points(group=group)})


def load(group: str, name: str) -> Any:
    """Load the object that a name in a group stands for.

    Raises:
        ImportError: if the object cannot be loaded. The message names the entry point and says why.
        KeyError: if there is no such name.
    """
    found: list[EntryPoint] = list(entry_points(group=group, name=name))
    if not found:
        raise KeyError(name)
    # Our own entry points come first, so that no package takes over a built-in name.
    ours = __name__.partition(".")[0]
    point = min(found, key=lambda point: not point.value.startswith(f"{ours}."))
    if len({other.value for other in found}) > 1:
        warn(
            f"several packages offer {name!r} in {group!r}: "
            f"{', '.join(sorted({other.value for other in found}))}. {point.value!r} is taken. "
            "Uninstall the package that you do not want, or ask for a class by itself"
        )
    try:
        return point.load()
    except (Exception, SystemExit) as error:  # a foreign package may raise anything on import
        raise ImportError(
            f"the entry point {point.name} = {point.value} in {group!r} is broken: "
            f"{type(error).__name__}: {error}. Reinstall its package, or uninstall it"
        ) from error


def load_working(group: str) -> dict[str, Any]:
    """Load every entry point of a group, by name; warn of each broken one, and leave it out."""
    loaded = {}
    for name in names(group):
        try:
            loaded[name] = load(group, name)
        except ImportError as error:
            warn(str(error))
    return loaded
