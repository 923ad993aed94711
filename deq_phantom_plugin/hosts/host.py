"""The contract of a host hook: what makes a framework take strategies by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

from torch import Tensor, nn

from ..state import State
from ..strategy import Context, GradStrategy


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

    @property
    def context(self) -> Context:
        """What a strategy may know of it."""
        return Context(
            self.batch_dim, self.initial_state, solver_result=self.solver_result, step=self.step
        )


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

    @abstractmethod
    def observe(self, module: nn.Module, callback: Callable[[Solve], None]) -> Callable[[], None]:
        """Call back after each solve of an equilibrium in training; nothing else changes.

        Needs no `enable`, and outlives a switch of the equilibrium's `grad`.

        Returns:
            A function that ends the observation.
        """
