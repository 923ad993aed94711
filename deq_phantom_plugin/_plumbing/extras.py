"""Imports optional packages when they are first needed.

If one is missing, the error gives the pip command that installs it. If one is installed but broken,
the error gives the reason.
"""

from __future__ import annotations

import importlib
import re
import sys
from importlib.metadata import requires
from importlib.util import find_spec
from typing import Any

_DISTRIBUTION = "deq-phantom-plugin"


def require(module: str, extra: str) -> Any:
    """Import an optional module and return it.

    Args:
        module: the module's full name.
        extra: the extra of this package that installs the module.

    Raises:
        ImportError: if the module is missing or broken. If it is missing, the message gives the pip
            command that installs it.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # not only ImportError: C++ extensions raise a RuntimeError
        package = module.partition(".")[0]
        missing = isinstance(error, ModuleNotFoundError) and error.name == module
        if is_there(package) and not missing:
            raise ImportError(_broken(module, error)) from error
        name = module if is_there(package) else package
        raise ImportError(f"{name} is not installed: {pip_line(extra)}") from error


def pip_line(extra: str) -> str:
    """Return the pip command that installs an extra."""
    return f'pip install "{_DISTRIBUTION}[{extra}]"'


def extras() -> dict[str, list[str]]:
    """Return the packages of each extra, from this package's metadata.

    An extra that consists of other extras has all their packages.
    """
    own: dict[str, list[str]] = {}
    parts: dict[str, list[str]] = {}
    for line in requires(_DISTRIBUTION) or ():
        marker = re.search(r"extra\s*==\s*['\"]([^'\"]+)", line)
        found = re.match(r"([\w.-]+)\s*(?:\[([^\]]*)\])?", line)
        if marker is None or found is None:
            continue
        packages = own.setdefault(marker[1], [])
        if found[1] == _DISTRIBUTION:
            parts.setdefault(marker[1], []).extend(re.split(r"\s*,\s*", found[2] or ""))
        else:
            packages.append(found[1])

    def whole(extra: str) -> list[str]:
        of_parts = [name for part in parts.get(extra, ()) for name in whole(part)]
        return list(dict.fromkeys([*of_parts, *own.get(extra, ())]))

    return {extra: whole(extra) for extra in own}


def is_there(package: str) -> bool:
    """Whether a package is installed, working or broken; nothing is imported."""
    try:
        return find_spec(package) is not None
    except ValueError:  # a module in `sys.modules` that was made by hand has no spec
        return sys.modules.get(package) is not None


def why_not(module: str) -> str:
    """Import a module; return the reason in words if that fails, else an empty text."""
    if not is_there(module.partition(".")[0]):
        return f"{module} is not installed"
    try:
        importlib.import_module(module)
    except Exception as error:
        return _broken(module, error)
    return ""


def _broken(module: str, error: Exception) -> str:
    """Return the text that a module is installed and cannot be imported, with the reason."""
    reasons: list[BaseException] = [error]
    while (cause := reasons[-1].__cause__) is not None:
        reasons.append(cause)
    text = f"{module} cannot be imported: {type(reasons[-1]).__name__}: {reasons[-1]}"
    if any("torchvision" in str(reason) for reason in reasons):
        text += (
            "; a torchvision that was built for another PyTorch breaks every package that imports "
            "torchvision: install the two together from one index, or uninstall torchvision"
        )
    return text
