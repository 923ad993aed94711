"""The tree is what docs/architecture.md says it is."""

from __future__ import annotations

import ast
import graphlib
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").is_file())
PACKAGE = "deq_phantom_plugin"
LINES, FUNCTION = 400, 60
GROUND = 12


@cache
def modules() -> dict[str, Path]:
    """Every module, by its name within the package."""
    found = {}
    for path in [*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "adapters").rglob("*.py")]:
        name = path.relative_to(ROOT).with_suffix("").parts
        name = name[1:] if name[0] == PACKAGE else name
        found[".".join(name[:-1] if name[-1] == "__init__" else name)] = path
    return found


@cache
def imports() -> dict[str, set[str]]:
    """What each module imports of this package, anywhere in it, for type checkers included."""
    return {name: set(_imports(name, path)) - {name} for name, path in modules().items()}


def _imports(name, path):
    inside = [*name.split("."), ""] if path.name == "__init__.py" else name.split(".")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if (alias.name + ".").startswith(PACKAGE + "."):
                    yield alias.name[len(PACKAGE) + 1 :]
        elif isinstance(node, ast.ImportFrom):
            source = (node.module or "").split(".")
            if node.level:
                source = [*inside[: len(inside) - node.level], *source]
            elif source.pop(0) != PACKAGE:
                continue
            source = ".".join(filter(None, source))
            for alias in node.names:
                full = f"{source}.{alias.name}" if source else alias.name
                yield full if full in modules() else source


def room(name: str) -> str:
    return name.partition(".")[0] or "__init__"


@cache
def floors() -> dict[str, int]:
    """The floor of each room, the lowest 0, from the page."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    lines = re.search(r"```floors\n(.+?)```", page, re.DOTALL)[1].strip().splitlines()
    return {name: i for i, line in enumerate(reversed(lines)) for name in line.split(", ")}


def test_every_room_has_a_floor():
    rooms = {room(name) for name in modules()}
    assert rooms - {"_moved"} == set(floors())  # old paths lead anywhere


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_down(name):
    if room(name) == "_moved":
        assert imports()[name] == set()  # by name only, when an old path is asked for
        return
    for other in imports()[name]:
        if room(other) not in (room(name), "_moved"):
            assert floors()[room(other)] < floors()[room(name)], f"{name} imports {other}"


def test_no_file_imports_itself_by_way_of_others():
    list(graphlib.TopologicalSorter(imports()).static_order())  # raises where there is a circle


def test_the_imports_are_seen():
    """Of relative ones, of the package, of modules, inside functions and for type checkers."""
    assert {"adjoint", "contract.state", "strategies.registry"} <= imports()["strategies.exact"]
    assert "hosts" in imports()["switch"]
    assert "_plumbing.entry_points" in imports()["strategies.registry"]
    assert "hosts.attaching" in set().union(
        *(found for name, found in imports().items() if name.startswith("adapters.ignn"))
    )


def test_the_ground_floor_is_small():
    assert len(list((ROOT / PACKAGE).glob("*.py"))) <= GROUND


def _sources():
    for folder in (PACKAGE, "adapters", "examples", "benchmarks"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def test_files_and_functions_are_short():
    """Or a line says why not: `# Longer than 400 lines: ...`, above the function for its 60."""
    for path in _sources():
        text = path.read_text()
        lines = text.splitlines()
        where = path.relative_to(ROOT)
        reason = any(line.startswith(f"# Longer than {LINES} lines: ") for line in lines)
        assert reason == (len(lines) >= LINES), f"{where}: {len(lines)} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                size = node.end_lineno - node.lineno + 1
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                above = lines[first - 2].strip() if first > 1 else ""
                known = above.startswith(f"# Longer than {FUNCTION} lines: ")
                assert known == (size >= FUNCTION), f"{where}: {node.name} has {size} lines"


def test_every_folder_says_what_is_in_it():
    for name, path in modules().items():
        if path.name == "__init__.py":
            assert ast.get_docstring(ast.parse(path.read_text())), name


def test_every_folder_is_installed():
    project = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^packages = \[\n(.+?)^\]", project, re.DOTALL | re.MULTILINE)[1]
    folders = {name for name, path in modules().items() if path.name == "__init__.py"}
    assert set(re.findall(r'"(.+)"', listed)) == {
        f"{PACKAGE}.{name}".rstrip(".") for name in folders
    }
