"""What commands leave behind: text tables, and files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows under a header in aligned columns, the first to the left, numbers to the right.

    Args:
        header: names of the columns.
        rows: one string a column.
    """
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [header, ["-" * width for width in widths], *rows]
    )


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a file so that it is there whole or as it was before.

    Args:
        path: the file; its folder is made if missing.
        content: all of it.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        draft.write_bytes(content)
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
