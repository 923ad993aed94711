"""Parts of error messages about unknown names: the name that was perhaps meant, the valid names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def hint(name: object, valid: Iterable[str]) -> str:
    """Return " (did you mean 'upg'?)", or an empty text if no valid name is similar."""
    names = {known.lower(): known for known in valid}
    near = difflib.get_close_matches(str(name).lower(), list(names), n=1)
    return f" (did you mean {names[near[0]]!r}?)" if near else ""


def listed(names: Iterable[str]) -> str:
    """Return names in quotes, separated by commas."""
    return ", ".join(map(repr, names))
