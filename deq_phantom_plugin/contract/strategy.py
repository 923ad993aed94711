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
"""The dimension along which independent samples lie; None where samples are coupled, so that the
state is one system; "auto" to find out which of the two holds."""


@dataclass(frozen=True)
class BackwardStats:
    """What a strategy spent and reached in one backward pass.

    B is the number of samples, and 1 where samples are coupled.

    Attributes:
        strategy: the spec of the strategy.
        n_vjp: the number of vector-Jacobian products that the strategy took. The last one, which
            reaches the parameters, is not counted.
        residual: ||v - (I - J^T) g|| / ||v|| per sample, shape (B,). None where the strategy does
            not know it.
        trace: the residual after each of the N checks of the solve, shape (B, N).
        n_clipped: the number of products that were clipped, see `clip` of `npg`. A product of a
            batch counts once per sample in which it was clipped.
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
        batch_dim: the dimension along which independent samples lie, the same in every leaf of the
            state; or None where samples are coupled, as the nodes of a graph are. "auto", the
            default, finds out whether the samples along dimension 0 are independent. That happens
            before a strategy is called, so a strategy sees a dimension or None. Samples are told
            apart only if every leaf has the same size in that dimension. Otherwise the state is
            treated as one system, which is right for any map.
        initial_state: the state where the forward solve began. It may carry a graph.
        solver_result: what the forward solver returned besides the equilibrium.
        step: the training step. None takes the step that the memory was told.
        total: the length of training in steps. None takes the memory's.
        place: the position of this equilibrium among those of its model, from 0. None takes the
            memory's.
        monitor: a function that gets the `BackwardStats` of each backward pass that has some.
        memory: what this equilibrium keeps between steps. What is found out about F, such as
            whether samples are coupled, is asked once with a memory, and in every call without.
        on_failure: what to do where a solve fails, see `guard`.
        process_group: the processes among which F communicates. They then evaluate F equally
            often, see docs/howto/distributed.md. "auto", the default, finds them by the modules
            that run in F. None says that F does not communicate.

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
        """The dimension along which independent samples lie, None where samples are coupled.

        Raises:
            ValueError: if it is still "auto". `dpp.attach` replaces that by what it finds out.
        """
        if isinstance(self.batch_dim, str):
            raise ValueError(
                f"batch_dim={self.batch_dim!r} reached a strategy, which does not find out whether "
                "samples are independent: dpp.attach does that. Call dpp.attach, or give the "
                "context a dimension such as 0, or None where samples depend on one another"
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
    """Refuse a value that is no `BatchDim`.

    Raises:
        ValueError: if `batch_dim` is neither a whole number, nor None, nor "auto".
    """
    known = batch_dim is None or batch_dim == "auto" or isinstance(batch_dim, int)
    if isinstance(batch_dim, bool) or not known:
        raise ValueError(
            f"batch_dim={batch_dim!r}; expected a dimension such as 0, None where samples depend "
            "on one another, or 'auto' to find that out"
        )


def check_process_group(process_group: Any) -> None:
    """Refuse a value that is neither a process group, nor "auto", nor None.

    Raises:
        ValueError: if `process_group` is none of these.
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

    With J = dF/dh at h* and v = dL/dh*, the exact gradient is (dF/dz)^T g, where g solves
    (I - J^T) g = v (the implicit function theorem; Bai et al. 2019, Theorem 1). A strategy
    computes this g, or another one that costs less.

    A strategy is declarative: subclass it as a frozen dataclass. With `repr=False` the subclass
    inherits a `repr` that is a spec, and that parses back to the same strategy. A gradient is of
    first order unless the subclass says that it can be differentiated again.

    The abilities below are properties, since they may depend on the arguments of the strategy. A
    subclass for which they do not may write `owns_solve = True`.

    Attributes:
        name: the name in specs, which `register_strategy` sets.
        owns_solve: whether the strategy finds the equilibrium itself. Hosts then skip their solve,
            and pass the initial state as the equilibrium.
        wants_inverse_jacobian: whether the strategy uses the estimate of the inverse Jacobian that
            a quasi-Newton solve makes. Hosts then put it into `context.solver_result`, where they
            can.
        needs_inverse_jacobian: whether the strategy, or one that it hands over to at some step,
            cannot do without that estimate. Hosts whose solve makes none then refuse it.
        accepts_nonfinite: whether the strategy can begin at a state that holds NaN or infinity.
        tells_samples_apart: whether the gradient depends on `context.batch_dim`. Where it does not,
            nobody has to find out whether samples are coupled.
        assumes_equilibrium: whether the gradient takes h = F(h) for granted. Then it is said where
            that is far from true. By default so, unless the strategy unrolls or owns the solve.
        exchanges: whether the backward pass exchanges numbers with other processes, so that all of
            them have to reach it.
        hands_out_states: whether the strategy has `states`.
        steps_ahead: the number of evaluations of F between the equilibrium that `attach` gets and
            the value that it returns: 1 where the value is F(h*). A host whose solve has a fixed
            length takes that many steps fewer. Ask what `resolve(context)` returns, since the
            number may depend on the training step.
    """

    name: ClassVar[str] = ""

    @property
    def owns_solve(self) -> bool:
        """Whether the strategy finds the equilibrium itself."""
        return False

    @property
    def wants_inverse_jacobian(self) -> bool:
        """Whether the strategy uses a quasi-Newton solve's estimate of the inverse Jacobian."""
        return False

    @property
    def needs_inverse_jacobian(self) -> bool:
        """Whether the strategy fails without that estimate, at any step."""
        return False

    @property
    def accepts_nonfinite(self) -> bool:
        """Whether the strategy can begin at a state that holds NaN or infinity."""
        return False

    @property
    def tells_samples_apart(self) -> bool:
        """Whether the gradient depends on which samples are independent; yes by default."""
        return True

    @property
    def assumes_equilibrium(self) -> bool:
        """Whether the gradient takes h = F(h) for granted; not if the strategy looks at that."""
        return not (self.owns_solve or self.hands_out_states)

    @property
    def exchanges(self) -> bool:
        """Whether its backward pass has to be reached in all processes."""
        return False

    @property
    def hands_out_states(self) -> bool:
        """Whether `states` yields the states between the equilibrium and the value."""
        return type(self).states is not GradStrategy.states

    @property
    def steps_ahead(self) -> int:
        """Evaluations of F between the equilibrium and the value that is returned."""
        return 1

    @abstractmethod
    def attach(self, func: Callable[[State], State], equilibrium: State, context: Context) -> State:
        """Return the equilibrium attached to autograd, so that backward yields this gradient.

        It is called under `torch.enable_grad`.

        Args:
            func: F, from a state to a state of the same structure and shapes. It is differentiable
                in its argument and in every tensor that it captures.
            equilibrium: h*, detached.
            context: what else is known.

        Returns:
            A state of the structure and shapes of `equilibrium`, with a graph.
        """

    def states(
        self, func: Callable[[State], State], equilibrium: State, context: Context
    ) -> Iterator[State]:
        """Yield the states on the way, each with its graph; `attach` returns the last one.

        Raises:
            NotImplementedError: if the strategy has none, see `hands_out_states`.
        """
        raise NotImplementedError(
            f"{self!r} makes its value at once and has no states on the way. Take a strategy that "
            "steps, such as 'upg' or 'bptt', or ask for the value alone"
        )

    def within(self, steps: int) -> GradStrategy:
        """Return the strategy for a loop of `steps` evaluations of F.

        It is the strategy itself, unless that would evaluate F more often than the loop does.

        Args:
            steps: the evaluations of the loop, at least 1.
        """
        return self

    def resolve(self, context: Context) -> GradStrategy:
        """Return the strategy that acts in this context.

        It is the strategy itself, unless the strategy is made of others, as a schedule is.
        """
        return self

    def __repr__(self) -> str:
        fields: Sequence[dataclasses.Field[Any]] = ()
        if dataclasses.is_dataclass(self):
            fields = dataclasses.fields(self)
        given = [(f, getattr(self, f.name)) for f in fields if f.init]
        # An argument that is None by default is off. Reports would otherwise name all of them.
        shown = [(f, value) for f, value in given if not (value is None and f.default is None)]
        arguments = ", ".join(f"{f.name}={value!r}" for f, value in shown)
        return f"{self.name or type(self).__name__}({arguments})"
