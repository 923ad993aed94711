"""The contract of a host hook: what makes a framework take strategies by name."""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..state import State, flatten
from ..strategy import Context, GradStrategy
from .patches import Patches


@dataclass(frozen=True, eq=False)
class Solve:
    """One forward solve of an equilibrium in training, as its host saw it.

    Attributes:
        func: F, from a state to a state of the same structure; valid until the parameters change.
        initial_state: where the solve began.
        equilibrium: the state it ended in, the last if several were sampled; detached.
        attached: the same state in the autograd graph, as the model goes on with it.
        strategy: the method behind that graph, also where it is the host's own.
        step: the training step, None where nobody has told it.
        residual: ||F(h) - h|| / ||F(h)|| of each sample, shape (B,); NaN where the host does not
            know it.
        nfe: evaluations of F that the solve took.
        batch_dim: see `Context.batch_dim`.
        solver_result: see `Context.solver_result`.
        index: which of the equilibria that the module finds in one forward pass, from 0.
    """

    func: Callable[[State], State]
    initial_state: State
    equilibrium: State
    attached: State
    strategy: GradStrategy
    step: int | None
    residual: Tensor
    nfe: int
    batch_dim: int | None = 0
    solver_result: Any = None
    index: int = 0

    @property
    def context(self) -> Context:
        """What a strategy may know of it."""
        return Context(
            self.batch_dim, self.initial_state, solver_result=self.solver_result, step=self.step
        )


class Host(ABC):
    """A hook into an installed framework; one object for each framework and process.

    `docs/howto/host.md` writes one. A host that changes classes or functions of its framework is
    easiest as a `PatchingHost`.

    Attributes:
        name: its name in `dpp.enable(name)`.
        package: the package it hooks.
        pip: what to install where the package is missing.
        distribution: the name that the package's version is known under, where it is another.
        known_versions: beginnings of the versions that it was tested with, such as "0.1"; empty
            where there is no framework but our own.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    pip: ClassVar[str]
    distribution: ClassVar[str] = ""
    known_versions: ClassVar[tuple[str, ...]] = ()

    def installed(self) -> bool:
        """Whether the framework can be imported."""
        return find_spec(self.package) is not None

    def version(self) -> str | None:
        """Return the framework's version, None where nothing tells it."""
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
        """Put the hook in force, also for references to the framework taken before; idempotent."""

    @abstractmethod
    def disable(self) -> None:
        """Restore the framework exactly; idempotent."""

    @abstractmethod
    def is_equilibrium(self, module: nn.Module) -> bool:
        """Whether a module is one of this framework's equilibria; imports nothing slow."""

    @abstractmethod
    def prepare_grad(self, module: nn.Module, spec: Any) -> Callable[[], None]:
        """Check a new `grad` for an equilibrium and return a function that switches to it.

        Raises:
            ValueError: if the equilibrium cannot take it.
        """

    @abstractmethod
    def observe(self, module: nn.Module, callback: Callable[[Solve], None]) -> Callable[[], None]:
        """Call back after each solve of an equilibrium in training; nothing else changes.

        Needs no `enable`, and outlives a switch of the equilibrium's `grad`.

        Returns:
            A function that ends the observation.
        """


@dataclass(frozen=True, eq=False)
class _Observation:
    """One of perhaps several observations with the same callback."""

    callback: Callable[[Solve], None]


class PatchingHost(Host):
    """A host that changes its framework's code, for as long as it is enabled or observes."""

    def __init__(self) -> None:
        self._patches = Patches()
        self._enabled = False
        # Not on the modules: copies and pickles of these are not observed.
        self._observed: weakref.WeakKeyDictionary[nn.Module, list[_Observation]]
        self._observed = weakref.WeakKeyDictionary()
        self._observations = 0
        self._lock = threading.RLock()

    @abstractmethod
    def patch(self, patches: Patches) -> None:
        """Make all changes, through `patches`; with none of them in use nothing may differ."""

    @property
    def is_enabled(self) -> bool:
        """Whether names are taken."""
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
        """See `Host.observe`; hooks then call `observers(module)`."""
        release, observation = self.hold(), _Observation(callback)
        with self._lock:
            self._observed.setdefault(module, []).append(observation)

        def end() -> None:
            with self._lock:
                known = self._observed.get(module, [])
                if observation in known:
                    known.remove(observation)
            release()

        return end

    def observers(self, module: nn.Module) -> list[Callable[[Solve], None]]:
        """Return what is to be called after a solve of a module."""
        return [observation.callback for observation in self._observed.get(module, ())]

    def hold(self) -> Callable[[], None]:
        """Keep the changes in place, for an observation; return what lets go of them."""
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
        if not self._patches:
            try:
                self.patch(self._patches)
            except BaseException:  # KeyboardInterrupt too: all of it or nothing
                self._patches.undo()
                raise

    def _restore(self) -> None:
        if not self._enabled and self._observations == 0:
            self._patches.undo()


def relative_residual(state: State, image: State, batch_dim: int | None) -> Tensor:
    """Return ||F(h) - h|| / ||F(h)|| of each sample, shape (B,), or (1,) where they are coupled.

    Args:
        state: h.
        image: F(h).
        batch_dim: see `Context.batch_dim`.
    """
    before, after = flatten(state)[0], flatten(image)[0]
    rows = 1 if batch_dim is None else before[0].shape[batch_dim]

    def norm(leaves: list[Tensor]) -> Tensor:
        flat = [
            x.reshape(1, -1) if batch_dim is None else x.movedim(batch_dim, 0).reshape(rows, -1)
            for x in leaves
        ]
        length: Tensor = torch.linalg.vector_norm(torch.cat(flat, dim=1), dim=1)
        return length

    return norm([b - a for a, b in zip(before, after, strict=True)]) / norm(after)
