"""The contract of a host hook: what makes a framework take strategies by name."""

from __future__ import annotations

import functools
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .._plumbing.calls import Calls
from .._plumbing.compilation import never_compiled
from .._plumbing.extras import is_there, why_not
from .._plumbing.precision import AutocastState
from .._plumbing.trial import Trial
from ..adjoint import Packing, relative_norm
from ..attach import attach
from ..contract.state import State, flatten
from ..contract.strategy import BatchDim, Context, GradStrategy
from .patches import Patches


@dataclass(frozen=True, eq=False)
class Solve:
    """One forward solve of an equilibrium in training, as its host saw it; see `Solve.of`.

    Attributes:
        func: F, from a state to a state of the same structure; valid until the parameters change.
        initial_state: where the solve began.
        equilibrium: the state it ended in, the last if several were sampled; detached.
        attached: the same state in the autograd graph, as the model goes on with it.
        strategy: the method behind that graph, also where it is the host's own.
        step: the training step, None where nobody has told it.
        nfe: evaluations of F that the solve took, 0 where the host cannot know.
        batch_dim: see `Context.batch_dim`.
        solver_result: see `Context.solver_result`.
        index: which of the equilibria that the module finds in one forward pass, from 0.
        known_residual: the residual, where the host's own solver has it.
    """

    func: Callable[[State], State]
    initial_state: State
    equilibrium: State
    attached: State
    strategy: GradStrategy
    step: int | None
    nfe: int
    batch_dim: BatchDim = "auto"
    solver_result: Any = None
    index: int = 0
    known_residual: Tensor | None = None
    _autocast: AutocastState = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_autocast", AutocastState(flatten(self.equilibrium)[0]))

    @classmethod
    def of(
        cls,
        func: Callable[[State], State],
        found: State,
        attached: State,
        strategy: GradStrategy,
        context: Context,
        nfe: int,
        **known: Any,
    ) -> Solve:
        """Return a solve from what a host has at hand.

        A strategy that owns its solve was given the initial state as what was found; what it did
        find is what it returned.

        Args:
            func: F.
            found: the state that the strategy was given, detached.
            attached: the state that it returned.
            strategy: the strategy.
            context: its context.
            nfe: evaluations of F until then.
            **known: `index` and `known_residual`.
        """
        if strategy.resolve(context).owns_solve:
            found = tree_map(Tensor.detach, attached)
        return cls(
            func,
            context.initial_state,
            found,
            attached,
            strategy,
            context.current_step,
            nfe,
            context.batch_dim,
            context.solver_result,
            **known,
        )

    @functools.cached_property
    def residual(self) -> Tensor:
        """||F(h) - h|| / ||F(h)|| of each sample, shape (B,); (1,) where they are coupled.

        Where the host does not know it, one evaluation of F when it is first asked for, which
        leaves no trace: valid until the parameters change.
        """
        if self.known_residual is not None:
            return self.known_residual
        with torch.no_grad(), self.trial():
            return relative_residual(self.equilibrium, self.func(self.equilibrium), self.batch_dim)

    @property
    def context(self) -> Context:
        """What a strategy may know of it."""
        return Context(
            self.batch_dim, self.initial_state, solver_result=self.solver_result, step=self.step
        )

    @contextmanager
    def trial(self) -> Iterator[Trial]:
        """Evaluate F as the solve did, under its autocast, inside a `with` block; see `Trial`."""
        with Trial(self.equilibrium) as trial, self._autocast():
            yield trial


class Counted:
    """A map, and how often it was called without and with autograd; trials of it do not count.

    Args:
        func: the map.

    Attributes:
        solver_result: how its solve ended, for hosts to fill in.
        producer: what attached the state that it ended in, likewise.
    """

    def __init__(self, func: Callable[..., Any]) -> None:
        self.func = self.__wrapped__ = func
        self.calls = Calls()
        self.solver_result: Any = None
        self.producer: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the map."""
        self.calls.note()
        return self.func(*args, **kwargs)

    @property
    @never_compiled
    def nfe(self) -> int:
        """Evaluations of the solve: solvers run without autograd, strategies that own it with."""
        return int(self.calls.of_solve())


def with_counted(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the arguments of a module whose first is F, named func, with F counted."""
    if args:
        return (Counted(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "func": Counted(kwargs["func"])}


@never_compiled
def tell(
    observers: Sequence[Callable[[Solve], None]],
    func: Callable[[State], State],
    found: State,
    attached: State,
    strategy: GradStrategy,
    context: Context,
    nfe: int,
    **known: Any,
) -> None:
    """Call observers with the solve that `Solve.of` makes of the other arguments."""
    if observers:
        solve = Solve.of(func, found, attached, strategy, context, nfe, **known)
        for observer in observers:
            observer(solve)


def attach_observed(
    observers: Sequence[Callable[[Solve], None]],
    func: Callable[[State], State],
    found: State,
    strategy: GradStrategy,
    context: Context,
    nfe: int,
    index: int = 0,
    known_residual: Tensor | None = None,
) -> State:
    """Attach a strategy to what a host found, as `dpp.attach` does, and tell observers.

    Args:
        observers: what to call with the solve.
        func: F.
        found: the state that the host's solve ended in, detached; for a strategy that owns the
            solve, where that begins.
        strategy: the strategy, resolved.
        context: its context, with the initial state.
        nfe: evaluations of F that the host's solve took; those of a strategy that owns the solve
            are counted.
        index: see `Solve`.
        known_residual: of what was found, where the host's solver has it.
    """
    if not observers or not torch.is_grad_enabled():
        return attach(func, found, strategy, context)
    counted = Counted(func)
    attached = attach(counted if strategy.owns_solve else func, found, strategy, context)
    taken = counted.nfe if strategy.owns_solve else nfe
    known = {"index": index, "known_residual": known_residual}
    tell(observers, func, found, attached, strategy, context, taken, **known)
    return attached


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
        """Whether the framework is there; it may be broken all the same. Imports nothing."""
        return is_there(self.package)

    def why_broken(self) -> str:
        """Import the framework; return in words why that fails, nothing where it does not."""
        return why_not(self.package)

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

    def prepare_in_eval(self, module: nn.Module, in_eval: bool) -> Callable[[], None]:
        """Check whether an equilibrium is to attach in evaluation mode, return what switches that.

        By default hosts attach in training mode alone, and say so.

        Raises:
            ValueError: if the equilibrium cannot.
        """
        if in_eval:
            raise ValueError(
                f"in_eval=True: the host {self.name} attaches in training mode only; call "
                "model.train(), with dropout and the like in evaluation mode where need be"
            )
        return _nothing

    @abstractmethod
    def observe(self, module: nn.Module, callback: Callable[[Solve], None]) -> Callable[[], None]:
        """Call back after each solve of an equilibrium in training; nothing else changes.

        Needs no `enable`, and outlives a switch of the equilibrium's `grad`.

        Returns:
            A function that ends the observation.
        """


def attaches_always(host: Host, in_eval: bool) -> Callable[[], None]:
    """Do what `Host.prepare_in_eval` does where a framework attaches in either mode.

    Raises:
        ValueError: if it is not to.
    """
    if not in_eval:
        raise ValueError(
            f"in_eval=False: {host.name} attaches in evaluation mode too; evaluate under "
            "torch.no_grad()"
        )
    return _nothing


def _nothing() -> None:
    """Do nothing."""


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


def relative_residual(state: State, image: State, batch_dim: BatchDim) -> Tensor:
    """Return ||F(h) - h|| / ||F(h)|| of each sample, shape (B,), or (1,) where they are coupled.

    Args:
        state: h.
        image: F(h).
        batch_dim: see `Context.batch_dim`; 0 where it is to be found out.
    """
    before, after = flatten(state)[0], flatten(image)[0]
    packing = Packing(before, 0 if isinstance(batch_dim, str) else batch_dim)
    h, f = packing.pack(before), packing.pack(after)
    return relative_norm(f - h, f)
