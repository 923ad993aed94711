"""Optional packages: imported when first needed, and if missing, said how to get."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, extra: str) -> Any:
    """Import an optional module.

    Args:
        module: its name.
        extra: the extra of this package that installs it.

    Raises:
        ImportError: if it is missing; gives the pip command.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'{module} is not installed: pip install "deq-phantom-plugin[{extra}]"'
        ) from error
