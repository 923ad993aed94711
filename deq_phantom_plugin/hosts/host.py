"""The contract of a host hook: what makes a framework take strategies by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, ClassVar

from torch import nn


class Host(ABC):
    """A hook into an installed framework; one object for each framework and process.

    Attributes:
        name: its name in `dpp.enable(name)`.
        package: the package it hooks.
        pip: what to install where the package is missing.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    pip: ClassVar[str]

    def installed(self) -> bool:
        """Whether the framework can be imported."""
        return find_spec(self.package) is not None

    @property
    @abstractmethod
    def is_enabled(self) -> bool:
        """Whether the hook is in force."""

    @abstractmethod
    def enable(self) -> None:
        """Put the hook in force, also for references to the framework taken before; idempotent."""

    @abstractmethod
    def disable(self) -> None:
        """Restore the framework exactly; idempotent."""

    @abstractmethod
    def is_equilibrium(self, module: nn.Module) -> bool:
        """Whether a module is one of this framework's equilibria."""

    @abstractmethod
    def prepare_grad(self, module: nn.Module, spec: Any) -> Callable[[], None]:
        """Check a new `grad` for an equilibrium and return a function that switches to it.

        Raises:
            ValueError: if the equilibrium cannot take it.
        """
