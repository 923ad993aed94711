"""Applies edits to Python source with LibCST, which keeps comments, spacing and line endings.

`rewrite` finds the statement at which each edit is anchored. It refuses a source in which an anchor
does not occur exactly once, since the edit was then written for another version.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from typing import Any

from .._plumbing.extras import require
from .._plumbing.fingerprint import fingerprint as fingerprint
from .adapter import Edit

cst = require("libcst", "patch")


class SeamError(ValueError):
    """A file of the seam is not as its adapter describes it."""


def rewrite(source: bytes, edits: Sequence[Edit], imports: str = "") -> bytes:
    """Return the source of a file with edits applied.

    Args:
        source: the bytes of the file.
        edits: the edits, see `Edit`.
        imports: statements for the top, below the docstring and the imports from `__future__`.

    Raises:
        SeamError: if the source does not parse, or if an anchor does not occur exactly once.
    """
    try:
        return _rewritten(source, edits, imports)
    except (RecursionError, MemoryError):
        raise SeamError("its code is nested too deeply to be parsed") from None


def _rewritten(source: bytes, edits: Sequence[Edit], imports: str) -> bytes:
    try:
        kept, tail = _split_tail(source)
        module = cst.parse_module(kept)
    except (cst.ParserSyntaxError, ValueError, SyntaxError) as error:
        raise SeamError(f"it does not parse: {error}") from None
    if module.bytes != kept:
        raise SeamError("it has characters that LibCST does not keep")
    rewriter = _Rewriter(module, edits)
    edited = module.visit(rewriter)
    for edit, hits in zip(edits, rewriter.hits, strict=True):
        if hits != 1 and not (edit.optional and hits == 0):
            where = f" in {edit.scope}" if edit.scope else ""
            raise SeamError(f"expected one statement {edit.anchor!r}{where}, found {hits}")
    if imports:
        body = list(edited.body)
        place = _after_preamble(body)
        body[place:place] = rewriter.statements(imports)
        edited = edited.with_changes(body=body)
    result: bytes = edited.bytes + tail
    return result


class _Rewriter(cst.CSTTransformer):  # type: ignore[misc,name-defined]
    """Visits all statements, applies the edits at their anchors, and counts the hits of each."""

    def __init__(self, module: Any, edits: Sequence[Edit]) -> None:
        super().__init__()
        self.module = module
        self.edits = edits
        self.hits = [0] * len(edits)
        self.scope: list[str] = []

    def statements(self, code: str) -> list[Any]:
        """Return code as statements in the style of the module."""
        lines = []
        for line in code.strip().splitlines():
            depth = (len(line) - len(line.lstrip(" "))) // 4
            lines.append(self.module.default_indent * depth + line[4 * depth :])
        text = self.module.default_newline.join([*lines, ""])
        body = cst.parse_module(text, config=self.module.config_for_parsing).body
        return [node.with_changes(leading_lines=_unindented(node.leading_lines)) for node in body]

    def visit_ClassDef(self, node: Any) -> None:
        self.scope.append(node.name.value)

    def leave_ClassDef(self, original_node: Any, updated_node: Any) -> Any:
        self.scope.pop()
        return updated_node

    def visit_FunctionDef(self, node: Any) -> None:
        self.scope.append(node.name.value)

    def leave_FunctionDef(self, original_node: Any, updated_node: Any) -> Any:
        self.scope.pop()
        return updated_node

    def leave_IndentedBlock(self, original_node: Any, updated_node: Any) -> Any:
        return self._edited(original_node, updated_node)

    def leave_Module(self, original_node: Any, updated_node: Any) -> Any:
        return self._edited(original_node, updated_node)

    def _edited(self, original: Any, updated: Any) -> Any:
        codes = [self._code(statement) for statement in original.body]
        body = list(updated.body)
        # From the end, so that the indices of earlier places stay valid.
        for number, first, last in sorted(self._places(codes), key=lambda hit: -hit[1]):
            edit = self.edits[number]
            self.hits[number] += 1
            new = self.statements(edit.new)
            if edit.where == "before":
                body[first:first] = new
            elif edit.where == "after":
                body[first + 1 : first + 1] = new
            else:
                new[0] = new[0].with_changes(leading_lines=body[first].leading_lines)
                body[first : last + 1] = new
        return updated.with_changes(body=body)

    def _places(self, codes: list[str]) -> Iterator[tuple[int, int, int]]:
        """Yield the number of an edit, and the indices of its first and last statement."""
        scope = ".".join(self.scope)
        for number, edit in enumerate(self.edits):
            if edit.scope not in ("", scope):
                continue
            for first, code in enumerate(codes):
                if not code.startswith(_squeezed(edit.anchor)):
                    continue
                through = _squeezed(edit.through or edit.anchor)
                ends = [i for i in range(first, len(codes)) if codes[i].startswith(through)]
                if ends:
                    yield number, first, ends[0]

    def _code(self, statement: Any) -> str:
        return _squeezed(self.module.code_for_node(statement.with_changes(leading_lines=[])))


def _split_tail(source: bytes) -> tuple[bytes, bytes]:
    """Split off what follows the last statement, where LibCST does not keep every blank."""
    statements = ast.parse(source).body
    last = statements[-1].end_lineno if statements else 0
    lines = source.splitlines(keepends=True)
    return b"".join(lines[:last]), b"".join(lines[last:])


def _unindented(lines: Sequence[Any]) -> list[Any]:
    """Return the lines above a statement, with the indentation of empty lines removed."""
    return [line.with_changes(indent=line.comment is not None) for line in lines]


def _squeezed(code: str) -> str:
    """Return code without any white space, as anchors are compared."""
    return "".join(code.split())


def _after_preamble(body: list[Any]) -> int:
    """Return the index of the first statement after the docstring and `from __future__`."""
    place = 0
    for i, statement in enumerate(body):
        first = statement.body[0] if isinstance(statement, cst.SimpleStatementLine) else None
        is_text = (
            i == 0
            and isinstance(first, cst.Expr)
            and isinstance(first.value, cst.SimpleString | cst.ConcatenatedString)
        )
        is_future = (
            isinstance(first, cst.ImportFrom)
            and isinstance(first.module, cst.Name)
            and first.module.value == "__future__"
        )
        if not (is_text or is_future):
            break
        place = i + 1
    return place
