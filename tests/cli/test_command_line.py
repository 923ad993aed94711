"""What all commands share: a version, a pipe that is closed, optional packages by name."""

from __future__ import annotations

import ast
import io
import os
import re
import sys
from importlib.metadata import version

import pytest

import deq_phantom_plugin as dpp
from conftest import ROOT
from deq_phantom_plugin._plumbing.extras import extras
from deq_phantom_plugin.cli import main
from deq_phantom_plugin.patching.doctor import _MODULES


def test_it_tells_its_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"deq-phantom {version('deq-phantom-plugin')}\n"
    assert version("deq-phantom-plugin") == dpp.__version__


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["list", "--help"]], ids=" ".join)
def test_a_closed_pipe_ends_it_quietly(monkeypatch, capfd, arguments):
    reader, writer = os.pipe()
    os.close(reader)  # as `| head -1` does once it has its line
    with io.TextIOWrapper(os.fdopen(writer, "wb")) as stream, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", stream)
        assert main(arguments) == 128 + 13
        stream.write("more")
        stream.flush()  # as Python does at its exit
    assert capfd.readouterr().err == ""


def test_the_list_fits_into_100_columns_and_keeps_every_word(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    words = " ".join(printed.split())
    for name in dpp.list_strategies():
        assert f"{name}(" in words
    guard = " ".join(repr(dpp.get_strategy("guard")).split())
    assert len(guard) > 100  # so it is wrapped
    assert guard in words
    assert dpp.UPG.__doc__.strip().partition("\n")[0] in words


# --- optional packages ------------------------------------------------------------------------

FOLDERS = ("deq_phantom_plugin", "adapters", "examples", "benchmarks")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
# What comes with a package that an extra has.
BROUGHT = {"adam-atan2-pytorch": "tiny-recursive-model", "pytorch-lightning": "lightning"}
PACKAGE_OF = {module.partition(".")[0]: name for name, module in _MODULES.items()}


def package_of(module: str) -> str:
    top = module.partition(".")[0]
    name = PACKAGE_OF.get(top, top.replace("_", "-"))
    return BROUGHT.get(name, name)


def required(source):
    """What a file gets by `require`: pairs of a module and an extra."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
            yield tuple(argument.value for argument in node.args)


def test_the_pip_line_installs_what_is_missing():
    pairs = {pair for source in SOURCES for pair in required(source)}
    assert len(pairs) > 10
    wrong = [
        (module, extra)
        for module, extra in pairs
        if module != "numpy" and package_of(module) not in extras()[extra]
    ]
    assert wrong == []


@pytest.mark.parametrize("package", ["matplotlib", "tensorboard", "tqdm", "rich", "yaml", "PIL"])
def test_what_only_shows_results_is_imported_by_require_alone(package):
    bare = re.compile(rf"^\s*(?:import|from) (?:torch\.utils\.)?{package}\b", re.M)
    found = [path for path in SOURCES if bare.search(path.read_text())]
    for path in found:
        modules = {module.partition(".")[0] for module, _ in required(path)}
        assert package in modules or path.is_relative_to(ROOT / "benchmarks"), path
