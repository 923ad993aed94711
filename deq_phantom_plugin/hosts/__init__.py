"""Hosts: hooks by which frameworks take strategies by name.

`host.py` has the contract of a host, and `registry.py` finds and enables hosts. Each framework has
a file or a folder of its own.
"""

from .._plumbing.calls import Counted
from .host import Host, PatchingHost
from .registry import (
    broken_hosts,
    disable,
    enable,
    enabled,
    find_equilibria,
    host_names,
    host_versions,
    register_host,
    what_is_found,
)
from .solve import Solve, attach_observed, relative_residual, tell

__all__ = [
    "Counted",
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
    "register_host",
    "relative_residual",
    "tell",
    "what_is_found",
]
