"""The contract: what a backward-pass strategy is, and what it is told."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from .failure import FailurePolicy
from .memory import Memory
from .state import State

BatchDim: TypeAlias = int | Literal["auto"] | None
"""The dimension that counts samples, None where they are coupled, "auto" to find that out."""


@dataclass(frozen=True)
class BackwardStats:
    """What a strategy spent and reached in one backward pass.

    Attributes:
        strategy: the strategy, as its spec.
        n_vjp: vector-Jacobian products taken, the one that reaches the parameters not counted.
        residual: ||v - (I - J^T) g|| / ||v|| for each sample, shape (B,); None where the
            strategy does not know it.
        trace: the same after each check of the solve, shape (B, N).
        n_clipped: products that were clipped, see `clip` of `npg`, each counted once for every
            sample in which it was (once, where samples are coupled).
    """

    strategy: str
    n_vjp: int
    residual: Tensor | None = None
    trace: Tensor | None = None
    n_clipped: int = 0


@dataclass(frozen=True)
class Context:
    """What a strategy may need to know besides the map and the equilibrium.

    Attributes:
        batch_dim: the dimension of every leaf that counts independent samples, or None where
            samples are coupled, as the nodes of a graph are. "auto", the default, finds out
            whether those along dimension 0 are, before a strategy is called that cares; a strategy
            sees a dimension or None. Samples are told apart only if every leaf has the same size
            there; otherwise the state is treated as one system, which is right for any map.
        initial_state: where the forward solve began; it may carry a graph.
        solver_result: what the forward solver returned besides the equilibrium.
        step: the training step; falls back to the memory's.
        total: how many training steps there will be; falls back to the memory's.
        place: which of its model's equilibria this is, from 0; falls back to the memory's.
        monitor: called with `BackwardStats` in each backward pass that has something to tell.
        memory: what this equilibrium keeps between steps; with one, what was found out of F is
            asked once, without one in every call.
        on_failure: what to do where a solve fails; see `guard`.
        process_group: the processes among which F communicates, which then evaluate it equally
            often, see docs/howto/distributed.md. "auto", the default, finds them by the modules
            that run in F; None says that there are none.

    Raises:
        ValueError: if `batch_dim` or `process_group` is none of these.
    """

    batch_dim: BatchDim = "auto"
    initial_state: State | None = None
    solver_result: Any = None
    step: int | None = None
    monitor: Callable[[BackwardStats], None] | None = None
    memory: Memory | None = None
    on_failure: FailurePolicy | None = None
    total: int | None = None
    place: int | None = None
    process_group: Any = "auto"

    def __post_init__(self) -> None:
        check_batch_dim(self.batch_dim)
        check_process_group(self.process_group)

    @property
    def sample_dim(self) -> int | None:
        """The dimension that counts independent samples, None where they are coupled.

        Raises:
            ValueError: if that has not been found out, as `dpp.attach` does.
        """
        if isinstance(self.batch_dim, str):
            raise ValueError(
                f"batch_dim={self.batch_dim!r} where a strategy is called by itself: dpp.attach "
                "finds out whether samples are independent; here say it, a dimension or None"
            )
        return self.batch_dim

    @property
    def current_step(self) -> int | None:
        """The training step, from whoever knows it."""
        if self.step is None and self.memory is not None:
            return self.memory.step
        return self.step

    @property
    def current_total(self) -> int | None:
        """The length of training in steps, from whoever knows it."""
        if self.total is None and self.memory is not None:
            return self.memory.total
        return self.total

    @property
    def current_place(self) -> int | None:
        """Which of its model's equilibria this is, from whoever knows it."""
        if self.place is None and self.memory is not None:
            return self.memory.place
        return self.place


def check_batch_dim(batch_dim: Any) -> None:
    """Refuse what is no `BatchDim`.

    Raises:
        ValueError: if it is none.
    """
    known = batch_dim is None or batch_dim == "auto" or isinstance(batch_dim, int)
    if isinstance(batch_dim, bool) or not known:
        raise ValueError(
            f"batch_dim={batch_dim!r}; expected a dimension such as 0, None where samples depend "
            "on one another, or 'auto' to find that out"
        )


def check_process_group(process_group: Any) -> None:
    """Refuse what is no process group, "auto" or None.

    Raises:
        ValueError: if it is none.
    """
    if process_group is None or (isinstance(process_group, str) and process_group == "auto"):
        return
    known = torch.distributed.is_available()
    if not (known and isinstance(process_group, torch.distributed.ProcessGroup)):
        raise ValueError(
            f"process_group={process_group!r:.60}; expected a group of torch.distributed, such as "
            "torch.distributed.group.WORLD, None where F does not communicate, or 'auto' to find "
            "that out"
        )


class GradStrategy(ABC):
    """A way to differentiate through an equilibrium h* = F(h*, z).

    A strategy is declarative: subclass as a frozen dataclass, with `repr=False` to inherit the
    spec that parses back to the same strategy. First order only, unless it says otherwise.

    What it is capable of are properties, since they may depend on its arguments; a subclass for
    which they do not may write `owns_solve = True`.

    Attributes:
        name: the name in specs; set by `register_strategy`.
        owns_solve: whether it finds the equilibrium itself; then hosts skip their solve and
            hand over the initial state in place of the equilibrium.
        wants_inverse_jacobian: whether it works on what a quasi-Newton solve learned of the
            inverse Jacobian; hosts then see that `context.solver_result` has it, where they can.
        accepts_nonfinite: whether it can begin at a state that holds NaN or infinity.
        tells_samples_apart: whether its gradient depends on `context.batch_dim`. Where it does not,
            nobody need find out whether samples are coupled.
        exchanges: whether its backward pass exchanges numbers with other processes, so that it has
            to be reached in all of them.
        hands_out_states: whether `states` is there.
        steps_ahead: evaluations of F by which the value that `attach` returns is ahead of the
            equilibrium it was given, 1 for F(h*); hosts whose solve has a fixed length take as
            many fewer. Asked of what `resolve(context)` returns: it may depend on the step.
    """

    name: ClassVar[str] = ""

    @property
    def owns_solve(self) -> bool:
        """Whether it finds the equilibrium itself."""
        return False

    @property
    def wants_inverse_jacobian(self) -> bool:
        """Whether it works on the inverse Jacobian of a quasi-Newton solve."""
        return False

    @property
    def accepts_nonfinite(self) -> bool:
        """Whether it can begin at a state that holds NaN or infinity."""
        return False

    @property
    def tells_samples_apart(self) -> bool:
        """Whether its gradient depends on which samples are independent: yes, unless it says no."""
        return True

    @property
    def exchanges(self) -> bool:
        """Whether its backward pass has to be reached in all processes."""
        return False

    @property
    def hands_out_states(self) -> bool:
        """Whether the states along the way can be had from `states`."""
        return type(self).states is not GradStrategy.states

    @property
    def steps_ahead(self) -> int:
        """Evaluations of F between the equilibrium and the value that is returned."""
        return 1

    @abstractmethod
    def attach(self, func: Callable[[State], State], equilibrium: State, context: Context) -> State:
        """Return the equilibrium attached to autograd, so that backward yields this gradient.

        Args:
            func: F, from a state to a state of the same structure, differentiable in its
                argument and in every tensor it captures.
            equilibrium: h*, detached, under `torch.enable_grad`.
            context: what else is known.
        """

    def states(
        self, func: Callable[[State], State], equilibrium: State, context: Context
    ) -> Iterator[State]:
        """Yield the states along the way, attached; the last is what `attach` returns."""
        raise NotImplementedError(f"{self!r} does not pass through states that it could hand out")

    def within(self, steps: int) -> GradStrategy:
        """Return the strategy for a loop of so many evaluations of F: itself, unless it has more.

        Args:
            steps: of the loop, at least 1.
        """
        return self

    def resolve(self, context: Context) -> GradStrategy:
        """Return the strategy that acts in this context: itself, unless it is a composite."""
        return self

    def __repr__(self) -> str:
        fields: Sequence[dataclasses.Field[Any]] = ()
        if dataclasses.is_dataclass(self):
            fields = dataclasses.fields(self)
        given = [(f, getattr(self, f.name)) for f in fields if f.init]
        # None by default is what is off, and would be named in every report.
        shown = [(f, value) for f, value in given if not (value is None and f.default is None)]
        arguments = ", ".join(f"{f.name}={value!r}" for f, value in shown)
        return f"{self.name or type(self).__name__}({arguments})"
