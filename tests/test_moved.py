"""Old import paths: they work and say the new one, files saved under them load, we use none."""

from __future__ import annotations

import importlib
import io
import pickle
import re
import subprocess
import sys

import pytest
import torch

import deq_phantom_plugin as dpp
from conftest import ROOT
from deq_phantom_plugin._moved import MOVED, PACKAGE, SAVED
from deq_phantom_plugin._plumbing.extras import why_not

ROWS = [(old, new) for old, places in MOVED.items() for new in places]


def old_and_new(old, new):
    """The modules of a row, and the public names that the old one hands out from the new."""
    if "adapters" in new and (why := why_not(f"{PACKAGE}.{new}")):
        pytest.skip(why)
    then, now = (importlib.import_module(f"{PACKAGE}.{path}") for path in (old, new))
    names = [
        name
        for name, value in vars(now).items()
        if not name.startswith("_")
        and str(getattr(value, "__module__", "")).startswith(now.__name__)
        and name not in vars(then)
    ]
    return then, now, names


@pytest.mark.parametrize(("old", "new"), ROWS)
def test_what_has_moved_is_handed_out_with_a_warning_that_names_its_place(old, new):
    then, now, names = old_and_new(old, new)
    assert names
    for name in names:
        text = f"{PACKAGE}.{old}.{name} has moved: import it from {PACKAGE}.{new}"
        with pytest.warns(DeprecationWarning, match=f"^{re.escape(text)}$") as seen:
            assert getattr(then, name) is getattr(now, name)
        assert [warning.filename for warning in seen] == [__file__]


@pytest.mark.parametrize(("old", "new"), ROWS)
@pytest.mark.filterwarnings(f"ignore:{PACKAGE}.* has moved:DeprecationWarning")
def test_pickles_find_it(old, new):
    _, now, names = old_and_new(old, new)
    for name in names:
        assert pickle.loads(f"c{PACKAGE}.{old}\n{name}\n.".encode()) is getattr(now, name)


def test_imports_of_every_form():
    with pytest.warns(DeprecationWarning, match="guard.Guard has moved"):
        from deq_phantom_plugin.guard import Guard
    with pytest.warns(DeprecationWarning, match=r"errors\.warn_once has moved.*_plumbing\.once$"):
        from deq_phantom_plugin.errors import warn_once
    with pytest.warns(DeprecationWarning, match="memory.Memory has moved"):
        assert dpp.memory.Memory is dpp.Memory
    assert Guard is dpp.Guard
    assert callable(warn_once)


@pytest.mark.parametrize("old", MOVED)
def test_unknown_names_are_refused(old):
    module = importlib.import_module(f"{PACKAGE}.{old}")
    for name in ("no_such_name", "__no_such_name__"):
        assert not hasattr(module, name)
    with pytest.raises(
        AttributeError, match=rf"'{PACKAGE}\.{old}' has no attribute 'no_such_name'"
    ):
        _ = module.no_such_name


SPECS = {
    "guard": "guard('ift(tol=1e-3)', on_failure=\"fallback('npg(k=3)')\")",
    "schedule": "schedule({0: 'jfb', 7: \"guard('ift', on_failure='raise')\"})",
}


@pytest.mark.filterwarnings(f"ignore:{PACKAGE}.* has moved:DeprecationWarning")
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_files_of_old_load_with_weights_only(spec, monkeypatch):
    strategy, file = dpp.get_strategy(spec), io.BytesIO()
    with monkeypatch.context() as patched:
        for old, names in SAVED.items():
            now = importlib.import_module(f"{PACKAGE}.{MOVED[old][0]}")
            for name in names:
                patched.setattr(getattr(now, name), "__module__", f"{PACKAGE}.{old}")
        torch.save({"grad": strategy}, file)
        pickled = pickle.dumps(strategy)
    assert any(f"{PACKAGE}.{old}".encode() in pickled for old in SAVED)
    file.seek(0)
    assert torch.load(file, weights_only=True)["grad"] == strategy
    assert pickle.loads(pickled) == strategy


IMPORT_ALL = f"""
import importlib, pkgutil
import {PACKAGE}
for start in ("{PACKAGE}", "{PACKAGE}.adapters"):
    for found in pkgutil.walk_packages(importlib.import_module(start).__path__, start + "."):
        if not found.name.endswith("__main__"):
            try:
                importlib.import_module(found.name)
            except ImportError:  # of an optional package
                pass
"""


def test_no_module_of_ours_goes_an_old_way():
    command = [sys.executable, "-W", f"error:{PACKAGE}:DeprecationWarning", "-c", IMPORT_ALL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_file_of_ours_names_an_old_path():
    # A module that is there still has lost some of its names.
    there = {name for name, module in sys.modules.items() if getattr(module, "__file__", None)}
    gone = [re.escape(old) for old in MOVED if f"{PACKAGE}.{old}" not in there]
    named = re.compile(rf"\b{PACKAGE}[./]({'|'.join(gone)})(?![\w/])")
    found = []
    for folder in ("deq_phantom_plugin", "adapters", "benchmarks", "docs", "examples", "tests"):
        for path in sorted((ROOT / folder).rglob("*.*")):
            if path.suffix in (".py", ".md") and path.name not in ("_moved.py", "test_moved.py"):
                text = path.read_text(encoding="utf-8")
                found += [f"{path.relative_to(ROOT)}: {m[0]}" for m in named.finditer(text)]
    assert found == []


@pytest.mark.parametrize(
    "name", ["_Bottleneck", "_Branch", "_Fusion", "_Head", "_MultiscaleLayer", "_ResidualBlock"]
)
def test_a_whole_mdeq_that_was_pickled_finds_its_layers(name):
    found = pickle.loads(f"c{PACKAGE}.adapters.mdeq\n{name}\n.".encode())
    assert found.__name__.removeprefix("_") == name.removeprefix("_")
    with pytest.raises(AttributeError, match="_Nothing"):
        pickle.loads(f"c{PACKAGE}.adapters.mdeq\n_Nothing\n.".encode())
