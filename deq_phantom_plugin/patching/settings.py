"""Lines inserted into files of settings in YAML; every other byte stays."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .adapter import Edit
from .rewrite import SeamError


def insert(source: bytes, edits: Sequence[Edit]) -> bytes:
    """Return a file of settings with lines inserted.

    Args:
        source: a file's bytes.
        edits: each a line `key: value` to insert after the line that begins with its anchor.

    Raises:
        SeamError: if there is not exactly one such line, its value goes on in the next, or the key
            is there already.
    """
    for edit in edits:
        lines = source.splitlines(keepends=True)
        key = edit.new.partition(":")[0]
        places = [i for i, line in enumerate(lines) if line.startswith(edit.anchor.encode())]
        if len(places) != 1:
            raise SeamError(f"expected one line {edit.anchor!r}, found {len(places)}")
        if any(re.match(rb"""["']?%s["']?\s*:""" % key.encode(), line) for line in lines):
            raise SeamError(f"it has a key {key!r} already")
        if re.match(rb"[ \t]+[^\s#]|-\s", b"".join(lines[places[0] + 1 :][:1])):
            raise SeamError(f"the value of {edit.anchor!r} goes on in the next line")
        before = lines[places[0]]
        ending = before[len(before.rstrip(b"\r\n")) :]
        if not ending:  # the last line of the file, which has no end of its own
            lines[places[0]] += b"\r\n" if b"\r\n" in source else b"\n"
        lines.insert(places[0] + 1, edit.new.encode() + ending)
        source = b"".join(lines)
    return source
