"""README and documentation: each promise names its test, code runs, links lead somewhere."""

from __future__ import annotations

import ast
import pkgutil
import re

import pytest

import deq_phantom_plugin as dpp
from conftest import ROOT
from deq_phantom_plugin import adjoint
from deq_phantom_plugin._plumbing.extras import why_not
from deq_phantom_plugin.strategies import registry

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ROW = re.compile(r"^\| (?P<promise>.+?) \| (?P<tests>.+) \|$")
TEST = re.compile(r"`((?:tests|deq_phantom_plugin/testing)/[\w/]+\.py)::(test_\w+)`")
LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")
HEADING = re.compile(r"^#+ (?P<text>.*?)(?: \{ #(?P<id>[\w-]+) \})?$", re.M)
# ```python at the start of a line; `<!-- run -->` above it runs the block, in the namespace of the
# page, and `<!-- run: module -->` only where that module is installed.
BLOCK = re.compile(r"(?:<!-- (run)(?:: ([\w.]+))? -->\n)?^```python\n(.*?)^```$", re.M | re.S)


def relative(page):
    return str(page.relative_to(ROOT))


def promises():
    """The rows of the tables, with the tests that they name."""
    rows = []
    for line in (ROOT / "docs" / "promises.md").read_text().splitlines():
        if line.startswith("| ") and not line.startswith(("| promise |", "| --- ")):
            row = ROW.match(line)
            assert row, f"no row of two cells: {line}"
            rows.append((row["promise"], TEST.findall(row["tests"]), row["tests"]))
    return rows


def test_every_promise_names_tests_and_nothing_else():
    rows = promises()
    assert len(rows) > 50
    for promise, tests, cell in rows:
        assert tests, f"no test: {promise}"
        assert ", ".join(f"`{path}::{name}`" for path, name in tests) == cell, promise
        assert len(set(tests)) == len(tests), f"a test twice: {promise}"
    told = [promise for promise, _, _ in rows]
    assert len(set(told)) == len(told)


def test_every_test_that_is_named_is_there_once():
    found = {}
    for promise, tests, _ in promises():
        for path, name in tests:
            if path not in found:
                tree = ast.parse((ROOT / path).read_text(), path)
                bodies = [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef))]
                found[path] = [n.name for b in bodies for n in b.body if hasattr(n, "name")]
            assert found[path].count(name) == 1, f"{path}::{name} is named by: {promise}"


def test_every_public_name_is_in_the_api():
    listed = set()
    for page in PAGES:
        for path in re.findall(r"^::: (\S+)$", page.read_text(), re.M):
            if "adapters" not in path:  # whose packages need not be installed
                pkgutil.resolve_name(path)
            listed.add(path.rpartition(".")[2])
    assert set(dpp.__all__) <= listed
    classes = map(registry.strategy_class, dpp.list_strategies())
    ours = {cls.__name__ for cls in classes if cls.__module__.startswith(dpp.__name__)}
    assert ours
    assert ours <= listed
    assert set(adjoint.SOLVERS) <= listed


def prose(page):
    """Return the text of a page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def anchors(page):
    """Return what a link into a page may end in, by the rule of MkDocs, which is GitHub's too."""
    found = set()
    for heading in HEADING.finditer(prose(page)):
        plain = re.sub(r"[^\w\s-]", "", heading["text"]).strip().lower()
        found.add(heading["id"] or re.sub(r"[-\s]+", "-", plain))
    return found


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_somewhere(page):
    for link in LINK.findall(prose(page)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_code_blocks_compile(page):
    text = page.read_text()
    blocks = BLOCK.findall(text)
    assert len(blocks) == text.count("```python")
    assert sum(run == "run" for run, _, _ in blocks) == text.count("<!-- run")
    for _, _, code in blocks:
        ast.parse(code)


@pytest.mark.parametrize("page", [p for p in PAGES if "<!-- run" in p.read_text()], ids=relative)
def test_code_blocks_run(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # for what they save
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    namespace = {"__name__": page.stem}
    for run, module, code in BLOCK.findall(page.read_text()):
        if module and (why := why_not(module)):
            pytest.skip(why)
        if run:
            exec(compile(code, relative(page), "exec", dont_inherit=True), namespace)
