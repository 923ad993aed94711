"""Changes to a framework's code that can be taken back exactly."""

from __future__ import annotations

import functools
import importlib.abc
import sys
import types
from collections.abc import Callable
from typing import Any


class Patches:
    """Makes changes, remembers them, and undoes them in reverse order.

    An interrupted `undo` may be called again: to undo a change twice does no harm.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def __bool__(self) -> bool:
        return bool(self._undo)

    def replace(self, cls: type, name: str, hook: Callable[[Any], Any]) -> None:
        """Replace a method of a class; existing objects and subclasses get the new one, too.

        Args:
            cls: the class that defines the method.
            name: the method's name.
            hook: takes the original method, and returns the new one.
        """
        original = cls.__dict__[name]
        self._undo.append(lambda: setattr(cls, name, original))
        setattr(cls, name, functools.wraps(original)(hook(original)))

    def add(self, cls: type, name: str, value: Any) -> None:
        """Give a class an attribute that the class does not have itself."""

        def undo() -> None:
            if cls.__dict__.get(name) is value:
                delattr(cls, name)

        self._undo.append(undo)
        setattr(cls, name, value)

    def replace_code(self, function: Any, stand_in: Any) -> None:
        """Let a function run another function's code.

        Scripts and modules may hold references to the function already. A new function under the
        same name would not reach them, so the code object inside the function is replaced.

        Args:
            function: the function to change. `function.deq_phantom_original` gets the old code.
            stand_in: the function with the new code. It must have no free variables, and it has to
                import what it needs, since it runs in the other function's module.
        """
        code = function.__code__
        original = types.FunctionType(
            code, function.__globals__, function.__name__, function.__defaults__
        )
        original.__kwdefaults__ = function.__kwdefaults__

        def undo() -> None:
            function.__code__ = code
            vars(function).pop("deq_phantom_original", None)

        self._undo.append(undo)
        function.deq_phantom_original = original
        function.__code__ = stand_in.__code__

    def when_imported(self, name: str, apply: Callable[[Any], None]) -> None:
        """Change a module now if it is loaded, else as soon as it is loaded; import nothing.

        Args:
            name: the module's full name.
            apply: makes the changes, and gets the module.
        """
        module = sys.modules.get(name)
        if module is not None:
            apply(module)
            return
        finder = _Finder(name, apply)
        self._undo.append(finder.remove)
        sys.meta_path.insert(0, finder)

    def also(self, undo: Callable[[], None]) -> None:
        """Call a function, too, when the changes are undone."""
        self._undo.append(undo)

    def undo(self) -> None:
        """Undo all changes."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module through the other finders, and has it changed after it is loaded."""

    def __init__(self, name: str, apply: Callable[[Any], None]) -> None:
        self.name, self.apply = name, apply

    def remove(self) -> None:
        """Take this finder out of `sys.meta_path`."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = None if find is None else find(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)  # type: ignore[assignment]
                return spec
        return None


class _Loader:
    """Loads a module with the module's own loader, then applies the changes."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:  # else the host was disabled in the meantime
            self._finder.remove()
            self._finder.apply(module)
