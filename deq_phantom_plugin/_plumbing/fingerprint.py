"""Fingerprints of functions in foreign code, by which known versions are recognised.

A fingerprint is a hash of a function's syntax tree. Comments, spacing and line endings do not
change it.
"""

from __future__ import annotations

import ast
import hashlib
from typing import Any


def fingerprint(source: bytes, function: str) -> str | None:
    """Return the fingerprint of a function, 16 hexadecimal digits; None if it cannot be read.

    Args:
        source: the bytes of a source file.
        function: the function's qualified name in that file, such as "Net.forward".
    """
    try:
        node: Any = ast.parse(source)
        for name in function.split("."):
            node = next((n for n in node.body if getattr(n, "name", None) == name), None)
            if node is None or not hasattr(node, "body"):
                return None
        return hashlib.sha256(repr(_plain(node)).encode()).hexdigest()[:16]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _plain(node: Any) -> Any:
    """Return a syntax tree as nested tuples, the same on every version of Python."""
    if isinstance(node, ast.AST):
        fields = [
            (name, _plain(value))
            for name, value in ast.iter_fields(node)
            if name not in ("ctx", "kind", "type_comment") and value not in (None, [])
        ]
        return (type(node).__name__, *fields)
    if isinstance(node, list):
        return tuple(_plain(item) for item in node)
    return node
