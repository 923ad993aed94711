"""How reports are saved: their numbers as JSON, their tables and plots as one HTML page."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..._plumbing.output import write_whole


@dataclass(frozen=True)
class Saved(ABC):
    """A report that can be saved; a subclass is a dataclass, and makes its own page."""

    @abstractmethod
    def _page(self) -> str:
        """Return the report as HTML."""

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers in types that JSON has; NaN and infinity become None."""
        return dict(_plain(asdict(self)))

    def save_json(self, path: str | Path) -> None:
        """Write all numbers to a file. A write that fails leaves no partial file."""
        write_whole(path, json.dumps(self.to_dict(), indent=1).encode())

    def save_html(self, path: str | Path) -> None:
        """Write one self-contained page with tables and plots. A failure leaves no partial file.

        Raises:
            ImportError: without matplotlib.
        """
        write_whole(path, self._page().encode())


def _plain(value: Any) -> Any:
    """Return a value in types that JSON has."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
