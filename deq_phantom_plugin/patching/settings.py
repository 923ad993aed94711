"""Inserts lines into YAML files of settings; every other byte of the file stays as it is."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .adapter import Edit
from .rewrite import SeamError


def insert(source: bytes, edits: Sequence[Edit]) -> bytes:
    """Return a YAML file with lines inserted.

    Args:
        source: the bytes of the file.
        edits: the edits. Each inserts its line `key: value` after the line that begins with its
            anchor.

    Raises:
        SeamError: if there is not exactly one line with the anchor, if the value of that line goes
            on in the next line, or if the file has the key already.
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
        if not ending:  # the last line of the file may have no line end
            lines[places[0]] += b"\r\n" if b"\r\n" in source else b"\n"
        lines.insert(places[0] + 1, edit.new.encode() + ending)
        source = b"".join(lines)
    return source
