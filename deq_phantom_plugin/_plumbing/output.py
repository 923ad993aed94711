"""Output of the commands: text tables, and files that are written completely or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table with aligned columns: the first column to the left, the others to the right.

    Args:
        header: the names of the columns.
        rows: the rows, with one string per column.
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
    """Write a file completely, or leave it as it was if writing fails.

    Args:
        path: the file; its folder is made if missing.
        content: the whole new content.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        draft.write_bytes(content)
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
