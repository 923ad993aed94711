"""Names that nobody knows: the one that was perhaps meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def hint(name: object, valid: Iterable[str]) -> str:
    """Return " (did you mean 'upg'?)", or nothing where no valid name is near."""
    names = {known.lower(): known for known in valid}
    near = difflib.get_close_matches(str(name).lower(), list(names), n=1)
    return f" (did you mean {names[near[0]]!r}?)" if near else ""


def listed(names: Iterable[str]) -> str:
    """Return names as they are accepted, in quotes."""
    return ", ".join(map(repr, names))
