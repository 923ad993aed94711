"""Loads the patched source of modules in the processes that `deq-phantom run` starts.

`run.py` copies this file as `sitecustomize.py` into a temporary folder on PYTHONPATH, with
`plan.json` beside it. So every Python process under `deq-phantom run` executes it at its start. It
installs an import hook that gives the planned modules their patched source and applies shims.
It imports only the standard library, since most of those processes never load a patched module.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import linecache
import os
import sys
import traceback
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))


class _PatchedLoader(importlib.machinery.SourceFileLoader):
    """Loads the patched source of one file in place of its own, and does not use `.pyc` files."""

    def __init__(self, fullname: str, path: str, entry: dict[str, str]) -> None:
        super().__init__(fullname, path)
        self.entry = entry

    def get_code(self, fullname: str) -> Any:
        with open(self.path, "rb") as stream:
            digest = hashlib.sha256(stream.read()).hexdigest()
        if digest != self.entry["digest"]:
            raise ImportError(
                f"{self.path} has changed since `deq-phantom run` read it, so its patched source "
                "is out of date; start `deq-phantom run` again"
            )
        with open(os.path.join(HERE, self.entry["source"]), "rb") as stream:
            content = stream.read()
        # `run` warns if no such file exists at the end: then no patched module was imported.
        open(os.path.join(HERE, self.entry["source"] + ".loaded"), "a").close()
        code = compile(content, self.path, "exec", dont_inherit=True)
        # `traceback` reads lines from this cache, so it shows those that run, not those on disk.
        lines = importlib.util.decode_source(content).splitlines(keepends=True)
        linecache.cache[self.path] = (len(content), None, lines, self.path)
        if sys.excepthook is sys.__excepthook__:
            sys.excepthook = traceback.print_exception
        return code


class _ShimLoader:
    """Loads a library, then applies the shims that need this library."""

    def __init__(self, loader: Any, names: list[str]) -> None:
        self.loader, self.names = loader, names

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _apply(self.names)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds modules as Python does, and replaces the loader of those that the plan names."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.waiting = dict(plan["shims"])

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        names = self.waiting.pop(fullname, None)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        if names:
            spec.loader = _ShimLoader(spec.loader, names)  # type: ignore[assignment]
        elif spec.origin:
            entry = self.plan["files"].get(os.path.realpath(spec.origin))
            if entry:
                spec.loader = _PatchedLoader(fullname, spec.origin, entry)
        return spec


def _install() -> None:
    with open(os.path.join(HERE, "plan.json"), encoding="utf-8") as stream:
        plan = json.load(stream)
    sys.meta_path.insert(0, _Finder(plan))
    if plan["stubs"]:
        _apply(plan["stubs"])


def _apply(names: list[str]) -> None:
    # `run` has put a copy of `compat` here. Importing it from our package would import torch, which
    # may be loading at this moment.
    import _deq_phantom_compat as compat  # type: ignore[import-not-found]

    compat.apply(*names)


def _run_hidden() -> None:
    """Run another `sitecustomize` that this one hides, if there is one."""
    rest = [folder for folder in sys.path if os.path.abspath(folder) != HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", rest)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if os.path.exists(os.path.join(HERE, "plan.json")):
    _install()
    _run_hidden()
