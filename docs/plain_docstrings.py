"""An extension of griffe: docstrings hold no HTML, and `<A v, g>` in one is an inner product."""

from __future__ import annotations

import re
from typing import Any

import griffe

# Code, which is left as it is, or what Markdown would take for a tag.
CODE_OR_TAG = re.compile(r"(`[^`]*`|\n\n    (?:.|\n(?!\n))*)|<(?=[A-Za-z/!?])")


class PlainDocstrings(griffe.Extension):
    """Escapes what looks like a tag in docstrings."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Escape the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = CODE_OR_TAG.sub(lambda m: m[1] or "&lt;", obj.docstring.value)
