"""What reports are kept as: their numbers as JSON, their tables and plots as a page."""

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
    """A report, which can be saved."""

    @abstractmethod
    def _page(self) -> str:
        """Return the report as a page."""

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers in types that JSON has; NaN and infinity become None."""
        return dict(_plain(asdict(self)))

    def save_json(self, path: str | Path) -> None:
        """Write all numbers to a file, whole or not at all."""
        write_whole(path, json.dumps(self.to_dict(), indent=1).encode())

    def save_html(self, path: str | Path) -> None:
        """Write one self-contained page with tables and plots, whole or not at all.

        Raises:
            ImportError: without matplotlib.
        """
        write_whole(path, self._page().encode())


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
