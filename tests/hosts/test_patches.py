"""Changes to a framework that are taken back, and modules that are changed as they load."""

from __future__ import annotations

import importlib
import sys

import pytest

from deq_phantom_plugin.hosts.patches import Patches


class Base:
    def f(self):
        return 1


class Child(Base):
    pass


def doubled(original):
    def f(self):
        return 2 * original(self)

    return f


def test_methods_are_replaced_for_objects_and_subclasses_that_are_there():
    patches, made, original = Patches(), Child(), Base.f
    patches.replace(Base, "f", doubled)
    patches.replace(Base, "f", doubled)
    assert made.f() == 4
    assert patches
    patches.undo()
    assert Base.f is original
    assert not patches
    patches.undo()


def test_functions_run_other_code_wherever_they_were_imported():
    def function(a, b=2, *, c=3):
        return a + b + c

    def stand_in(a, b=0, *, c=0):
        return "ours", a, b, c

    held, patches = function, Patches()
    patches.replace_code(function, stand_in)
    assert held(1) == ("ours", 1, 2, 3)  # its own defaults
    assert function.deq_phantom_original(1, c=5) == 8
    patches.undo()
    assert held(1) == 6
    assert not hasattr(function, "deq_phantom_original")


def test_attributes_are_added_and_taken_away_unless_somebody_took_their_place():
    patches = Patches()
    patches.add(Base, "g", lambda self: 1)
    patches.add(Base, "h", lambda self: 1)
    mine = Base.h = lambda self: 2
    patches.undo()
    assert not hasattr(Base, "g")
    assert Base.h is mine
    del Base.h


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "deq_test_framework.py").write_text(
        "class A:\n    def f(self):\n        return 1\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    before = list(sys.meta_path)
    yield "deq_test_framework"
    sys.modules.pop("deq_test_framework", None)
    assert sys.meta_path == before


def test_a_module_is_changed_when_it_is_imported(module):
    patches, applied = Patches(), []

    def apply(loaded):
        applied.append(loaded)
        patches.replace(loaded.A, "f", doubled)

    patches.when_imported(module, apply)
    assert not applied
    loaded = importlib.import_module(module)
    assert applied == [loaded]
    assert loaded.A().f() == 2
    assert type(loaded.__loader__).__name__ == "SourceFileLoader"
    assert loaded.__spec__.loader is loaded.__loader__
    patches.undo()
    assert loaded.A().f() == 1
    patches.when_imported(module, apply)  # at once
    assert loaded.A().f() == 2
    patches.undo()


def test_a_module_that_loads_after_the_undo_is_left_alone(module):
    patches = Patches()
    patches.when_imported(module, lambda loaded: patches.replace(loaded.A, "f", doubled))
    patches.undo()
    assert importlib.import_module(module).A().f() == 1


def test_other_finders_need_not_find_specs(module, monkeypatch):
    class Legacy:
        pass

    patches = Patches()
    sys.meta_path.insert(0, Legacy())
    try:
        patches.when_imported(module, lambda loaded: None)
        assert importlib.import_module(module).A().f() == 1
    finally:
        patches.undo()
        sys.meta_path[:] = [f for f in sys.meta_path if type(f) is not Legacy]
