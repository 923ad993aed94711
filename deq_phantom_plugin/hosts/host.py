"""The contract of a host, by which a framework takes strategies by name.

A subclass of `Host` hooks one framework. It says which modules are equilibria, switches their
strategies, and lets observers see their solves. `PatchingHost` is for frameworks whose classes or
functions have to be changed.
"""

from __future__ import annotations

import functools
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import metadata
from typing import Any, ClassVar, Literal

from torch import nn

from .._plumbing.extras import is_there, why_not
from .patches import Patches
from .solve import Observers, Solve, add_observer


class Host(ABC):
    """A hook into an installed framework. Each process has one object for each framework.

    `docs/howto/host.md` shows how to write one. A host that changes classes or functions of its
    framework is easiest as a `PatchingHost`.

    Attributes:
        name: the host's name in `dpp.enable(name)`.
        package: the package that the host hooks.
        pip: the arguments of `pip install` that install the package.
        distribution: the name under which the package's version is known, if that is another name.
        known_versions: the beginnings of the versions that the host was tested with, such as "0.1".
            It is empty if there is no foreign framework.
        in_eval: whether equilibria attach a gradient in evaluation mode too. "never": they do not.
            "always": they do, since the framework does not look at the mode. "told": each
            equilibrium has a `grad_in_eval`, see `attaches`.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    pip: ClassVar[str]
    distribution: ClassVar[str] = ""
    known_versions: ClassVar[tuple[str, ...]] = ()
    in_eval: ClassVar[Literal["never", "always", "told"]] = "never"

    def installed(self) -> bool:
        """Whether the framework is installed, working or broken; nothing is imported."""
        return is_there(self.package)

    def why_broken(self) -> str:
        """Import the framework; return the reason in words if that fails, else an empty text."""
        return why_not(self.package)

    def version(self) -> str | None:
        """Return the framework's version, None if it is unknown."""
        try:
            return metadata.version(self.distribution or self.package)
        except metadata.PackageNotFoundError:
            return None

    @property
    def is_known_version(self) -> bool:
        """Whether the installed version is one that the host was tested with."""
        version = self.version()
        if not self.known_versions or version is None:
            return not self.known_versions
        return any(f"{version}.".startswith(f"{known}.") for known in self.known_versions)

    @property
    @abstractmethod
    def is_enabled(self) -> bool:
        """Whether the hook is in force."""

    @abstractmethod
    def enable(self) -> None:
        """Put the hook in force, also for what was imported before. A second call does nothing."""

    @abstractmethod
    def disable(self) -> None:
        """Restore the framework exactly. A second call does nothing."""

    def acts_disabled(self, spec: Any) -> bool:
        """Whether a spec that was set acts while the host is not enabled.

        If not, `dpp.set_grad` says so.
        """
        return True

    @abstractmethod
    def is_equilibrium(self, module: nn.Module) -> bool:
        """Whether a module is one of this framework's equilibria; it should import nothing slow.

        If the framework is not imported yet, no module can be one of its equilibria.
        """

    @abstractmethod
    def prepare_grad(self, module: nn.Module, spec: Any) -> Callable[[], None]:
        """Check a new spec for an equilibrium, and return a function that switches to it.

        The check is separate, so that `dpp.set_grad` switches all equilibria of a model or none.

        Args:
            module: the equilibrium.
            spec: the new `grad`, see `get_strategy`; the framework's own values may be valid too.

        Raises:
            ValueError: if the equilibrium cannot take the spec.
        """

    def prepare_in_eval(self, module: nn.Module, in_eval: bool) -> Callable[[], None]:
        """Return a function that switches whether an equilibrium attaches in evaluation mode.

        Args:
            module: the equilibrium.
            in_eval: whether it is to attach a gradient in evaluation mode.

        Raises:
            ValueError: if the host never attaches there and `in_eval` is True, or if it always does
                and `in_eval` is False.
        """
        if self.in_eval == "told":
            return functools.partial(setattr, module, "grad_in_eval", in_eval)
        if in_eval and self.in_eval == "never":
            raise ValueError(
                f"in_eval=True: the host {self.name} attaches in training mode only. Call "
                "model.train(), and .eval() on layers such as dropout that must not act"
            )
        if not in_eval and self.in_eval == "always":
            raise ValueError(
                f"in_eval=False: {self.name} attaches in evaluation mode too, and cannot be told "
                "not to. Evaluate under torch.no_grad()"
            )
        return lambda: None

    @abstractmethod
    def observe(self, module: nn.Module, callback: Callable[[Solve], None]) -> Callable[[], None]:
        """Call `callback` after each solve of an equilibrium in training; change nothing else.

        This works without `enable`, and goes on after a switch of the equilibrium's `grad`.

        Returns:
            A function that ends the observation.
        """


class PatchingHost(Host):
    """A host that changes its framework's code, as long as it is enabled or observes a module."""

    def __init__(self) -> None:
        self._patches = Patches()
        self._enabled = False
        # Observers are not kept on the modules, so that copies and pickles are not observed.
        self._observed: weakref.WeakKeyDictionary[nn.Module, Observers]
        self._observed = weakref.WeakKeyDictionary()
        self._observations = 0
        self._lock = threading.RLock()

    @abstractmethod
    def patch(self, patches: Patches) -> None:
        """Make all changes through `patches`.

        A model without a name must compute the same as before, to the bit.
        """

    def acts_disabled(self, spec: Any) -> bool:
        """See `Host.acts_disabled`. Without the hook only the framework's own gradient acts."""
        return spec is None

    @property
    def is_enabled(self) -> bool:
        """Whether the framework takes names now."""
        return self._enabled

    def enable(self) -> None:
        """See `Host.enable`."""
        with self._lock:
            self._apply()
            self._enabled = True

    def disable(self) -> None:
        """See `Host.disable`."""
        with self._lock:
            self._enabled = False
            self._restore()

    def observe(self, module: nn.Module, callback: Callable[[Solve], None]) -> Callable[[], None]:
        """See `Host.observe`. Hooks get the callbacks by `observers(module)`."""
        release = self.hold()
        with self._lock:
            forget = add_observer(self._observed.setdefault(module, []), callback)

        def end() -> None:
            with self._lock:
                forget()
            release()

        return end

    def observers(self, module: nn.Module) -> list[Callable[[Solve], None]]:
        """Return the callbacks to call after a solve of a module."""
        return [callback for (callback,) in self._observed.get(module, ())]

    def hold(self) -> Callable[[], None]:
        """Keep the changes in place for an observation; return a function that ends this."""
        with self._lock:
            self._apply()
            self._observations += 1
        released = False

        def release() -> None:
            nonlocal released
            with self._lock:
                self._observations -= not released
                released = True
                self._restore()

        return release

    def _apply(self) -> None:
        """Make the changes, unless they are made already."""
        if not self._patches:
            try:
                self.patch(self._patches)
            except BaseException:  # KeyboardInterrupt too: make all changes or none
                self._patches.undo()
                raise

    def _restore(self) -> None:
        """Take the changes back, unless the host is enabled or observes a module."""
        if not self._enabled and self._observations == 0:
            self._patches.undo()
