"""Auto: the cheapest strategy whose gradient is good enough, found while training."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from torch import Tensor

from .._plumbing.compilation import never_compiled
from .._plumbing.lockstep import any_of
from .._plumbing.once import warn_once
from .._plumbing.trial import Trial
from ..adjoint import Linearization
from ..contract.errors import AssumptionWarning, ConvergenceWarning
from ..contract.memory import Memory
from ..contract.state import State
from ..contract.strategy import Context, GradStrategy
from .arguments import positive_int
from .candidates import Runs
from .choice import Rule, shared
from .ift import IFT, stats_of
from .measurement import Reference, reference
from .noted import Log
from .registry import Spec, get_strategy, register_strategy
from .rescue import Rescue
from .told import not_resolved

_FIRST = 8  # the part of `every` after which it looks again at first, and then twice as long
_SOONER = 10  # times as often it looks where the state is off, but after so many steps at least


@register_strategy("auto")
@dataclass(frozen=True, repr=False)
class Auto(GradStrategy):
    """The cheapest strategy whose gradient is good enough, measured anew every `every` steps.

    It measures at training step 0, at an eighth, a quarter and half of `every`, since a model
    changes most at first, and then every `every` steps. Where it begins at a later step n, it does
    so again at 2 n, 4 n, ..., but each time after an eighth of `every` at least and `every` at
    most. There the backward pass takes the gradient v that came in and solves (I - J^T) g = v by
    GMRES to 1e-4, or to 1e-3 where that takes more than 50 products: that step's gradient, and the
    reference. Its Krylov space holds what `npg` and `upg` of up to 50 terms with lam 1.0, 0.9, ...
    0.1 and looser solves would have got, so that all of them are judged without another product. Of
    those whose g has a cosine of at least `cosine` to the reference's in at least 90 % of the
    samples (of more than 128, of 128 that are drawn) the cheapest acts from the next step on; where
    there is none `ift`, which is said once. What acts goes on until it falls below `cosine`, or one
    that costs at most 0.9 as much is above it by a third of what is missing to 1: at a border
    nothing flutters.

    A series of more than one term is taken only where the map damped by its lam contracts, also if
    every 1 - mu, mu an eigenvalue of J, were 1.2 times as large: in 90 % of the samples (of more
    than 32, of 32), and of the eigenvalues that v sees. With B = lam J + (1 - lam) I the sum of k
    terms is (I - B^k) g*, which elsewhere may point against g* in a direction that the cosine
    hardly sees and that training then feeds. Nor is one taken that is more than twice as long as
    the reference in any sample, since |1 - b^k| <= 2 where |b| <= 1: the few in which it grows
    would drown the others. Where the series that acted does not contract any more, the next
    measurement says so, once.

    Costs are counted: an evaluation of F as one, a backward pass through it as two. So `npg` is
    taken rather than `upg`, which is the same at an equilibrium (eq. A-14) for k - 1 evaluations
    more. A solve costs what its slowest sample does; looser ones that would stop above their `tol`,
    after 48 vectors or at the rounding of F, are not taken.

    A state is at its equilibrium if ||F(h) - h|| <= 0.1 ||F(h)||, as for `guard`: the error of
    implicit differentiation elsewhere grows in proportion to the distance (Blondel et al. 2022,
    "Efficient and Modular Implicit Differentiation", Theorem 1), and a recursive model whose states
    are far from it learned nothing by a Neumann series where unrolling trained (TRM, 4x4 Sudoku).
    Where more than 10 % of the samples are not, `upg` acts, with k = `budget`, else 5, and the
    least damping for which its steps contract. Whether that has changed is looked at ten times as
    often, but at most every tenth step (every `every` if that is less, and 2), for ten products;
    the gradient of such a step is v itself, that of one step. Where no damping brings the radius of
    lam J + (1 - lam) I below 1, steps lead away from the equilibrium: `upg` too, the cheapest that
    is good enough if there is one that costs no more than `ift`.

    The step is told by `dpp.set_step(model, step)`; what was chosen, when and why is kept in the
    equilibrium's memory (`dpp.memory_state_dict`) and told by `dpp.report_choice(model)`. Several
    calls in one step measure once; all of them have the reference's gradient in that step. Several
    processes decide on numbers that they exchange once a measurement, in the default group, and
    must all measure: load a memory in all of them or in none. Without a memory nothing could be
    kept, and the gradient is the reference's each time. A measurement holds the vectors of its
    solve: up to 50, as `ift` does, and up to 98 where it takes more products.

    Args:
        cosine: in (0, 1], what 90 % of the samples are to reach.
        every: steps from one measurement to the next, but for the first ones.
        methods: specs of strategies to choose among in place of these, also your own. Each is run
            in the measuring step, with the same v, and judged by its cosine alone; one that draws
            in backward, as `npg_rr`, by one draw. Where `upg` would act, it is the one of them that
            unrolls furthest; if none does, that of the highest cosine, or of the fewest products
            where there is no reference. None of them may own its solve or change with the step.
        budget: the most products, backward passes through F with the one to the parameters: then
            the strategy of the highest cosine within it is taken, whatever `cosine` is. That may
            be `ift` with so many, which says once that it stops short of its `tol`.

    Raises:
        ValueError: if an argument is out of range, or a method unknown or not one for this.
        RuntimeError: in `attach`, inside a transform of `torch.func`; in backward, if one of
            `methods` fails.
    """

    cosine: float = 0.95
    every: int = 200
    methods: Sequence[Spec] | None = None
    budget: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "cosine", _cosine(self.cosine))
        object.__setattr__(self, "every", positive_int("every", self.every))
        if self.budget is not None:
            object.__setattr__(self, "budget", positive_int("budget", self.budget))
        if self.methods is not None:
            object.__setattr__(self, "methods", _methods(self.methods))

    @never_compiled  # or for each step anew
    def resolve(self, context: Context) -> GradStrategy:
        """Return what measures in this step, or the strategy that was chosen."""
        memory, step = context.memory, context.current_step
        if memory is None:
            if not Trial.depth():
                _say_without_memory(self)
            return Measuring(self)
        if step is None and memory.training and not Trial.depth():
            _say_untold(self)
        log = Log(memory, repr(self))
        if memory.training and self._is_due(log, step):
            return Measuring(self)
        last = log.last
        return IFT() if last is None else self._named(last.spec).resolve(context)

    def _is_due(self, log: Log, step: int | None) -> bool:
        """Whether a step measures, has measured, or is not after the last measurement."""
        measured = log.measured
        if measured is None:
            return True
        if log.is_off:  # steps that look have one step's gradient, so that others are to be many
            every = max(2, self.every // _SOONER, min(self.every, _SOONER))
        else:  # what training changes most in its first steps
            every = min(self.every, max(measured, math.ceil(self.every / _FIRST)))
        return step is not None and not measured < step < measured + every

    @property
    def rule(self) -> Rule:
        """By which it chooses."""
        return Rule(self.cosine, self.budget, not self.strategies)

    def _named(self, spec: str) -> GradStrategy:
        """Return the strategy of a spec that was chosen."""
        for strategy in self.strategies:
            if repr(strategy) == spec:
                return strategy
        return _strategy(spec)

    @property
    def strategies(self) -> Sequence[GradStrategy]:
        """`methods`; none where they are the built-in ones."""
        return [m for m in self.methods or () if isinstance(m, GradStrategy)]

    @property
    def wants_inverse_jacobian(self) -> bool:
        """Whether one of `methods` does."""
        return any(strategy.wants_inverse_jacobian for strategy in self.strategies)

    @property
    def needs_inverse_jacobian(self) -> bool:
        """Whether one of `methods` does: all are measured."""
        return any(strategy.needs_inverse_jacobian for strategy in self.strategies)

    @property
    def steps_ahead(self) -> int:
        """Not known before the step is.

        Raises:
            ValueError: always.
        """
        raise not_resolved(self)

    def attach(self, func: Callable[[State], State], equilibrium: State, context: Context) -> State:
        """See `GradStrategy.attach`."""
        return self.resolve(context).attach(func, equilibrium, context)

    def __repr__(self) -> str:
        methods = f", methods={list(map(repr, self.strategies))!r}" if self.methods else ""
        budget = "" if self.budget is None else f", budget={self.budget}"
        return f"{self.name}(cosine={self.cosine!r}, every={self.every!r}{methods}{budget})"


@dataclass(frozen=True, repr=False)
class Measuring(GradStrategy):
    """What `auto` does in a step that measures: the implicit gradient, from which it chooses.

    The value is F(h*), as that of `ift`.

    Attributes:
        auto: whose step it is.
    """

    auto: Auto

    @property
    def wants_inverse_jacobian(self) -> bool:
        """See `Auto`."""
        return self.auto.wants_inverse_jacobian

    @property
    def assumes_equilibrium(self) -> bool:
        """No: the choice looks at the residual of each sample."""
        return False

    @property
    def exchanges(self) -> bool:
        """Yes: what all processes have measured."""
        return True

    def attach(self, func: Callable[[State], State], equilibrium: State, context: Context) -> State:
        """See `GradStrategy.attach`."""
        graph = Linearization(func, equilibrium, self.auto)
        rescue = Rescue(func, equilibrium, context) if context.on_failure else None
        memory, monitor, batch_dim = context.memory, context.monitor, context.sample_dim
        measure: _Measurement | None = None
        if memory is not None and memory.training and not Trial.depth():
            runs = None
            if self.auto.strategies:
                runs = Runs(self.auto.strategies, func, equilibrium, context)
            step = context.current_step
            measure = _Measurement(self.auto, Log(memory, repr(self.auto)), step, runs)

        def adjoint(v: list[Tensor]) -> list[Tensor]:
            found = reference(graph, v, batch_dim, memory, rescue)
            if monitor is not None:
                monitor(stats_of(self.auto, replace(found.solution, residual=found.residual)))
            if measure is not None and not Trial.depth():
                measure(found)
            return found.g

        return graph.attach(graph.outputs, adjoint)

    def __repr__(self) -> str:
        return repr(self.auto)


class _Measurement:
    """Chooses in a backward pass, once a step.

    Args:
        auto: the strategy.
        log: where it notes what it chose.
        step: the training step.
        runs: of the user's methods; None if there are none.
    """

    def __init__(self, auto: Auto, log: Log, step: int | None, runs: Runs | None) -> None:
        self._auto, self._log, self._step, self._runs = auto, log, step, runs

    def __call__(self, found: Reference) -> None:
        """Measure, and note what acts from the next step on.

        Where an infinity came in, as in a step that GradScaler drops, the next step measures.

        Args:
            found: the reference.
        """
        auto, step = self._auto, self._step or 0
        measured = self._log.measured
        if measured is not None and (self._step is None or measured == step):
            self._count_again(measured)
            return  # by another call of this step
        own = found.numbers(auto.budget, self._runs)
        any_of(False)  # all processes have theirs: what follows they do alike
        numbers = shared(own, found.v[0].device)
        if numbers.broken or not numbers.rows:
            return
        last = self._log.last
        choice, wanting = auto.rule.decide(numbers, last, step)
        self._log.note(choice)
        if last is not None and numbers.has_left(last):
            warn_once(
                "auto too late",
                f"{auto!r}, step {step}: {last.spec}, as chosen in step {last.step}, does not "
                "contract everywhere any more, so gradients since then may have been wrong. From "
                f"the next step on {choice.spec} acts. Measure more often, by a smaller `every`, "
                "or regularise the Jacobian (dpp.jacobian_reg). This is said once per run.",
                ConvergenceWarning,
            )
        if wanting:
            warn_once(
                f"auto {choice.trouble}",
                f"{auto!r}, step {step}: {choice.why}. So {choice.spec} acts from the next step "
                "on. dpp.report_choice(model) shows what acted when. This is said once per run.",
                ConvergenceWarning,
            )

    def _count_again(self, measured: int) -> None:
        """Say once that a training step seems to stand still: each of its calls pays for `ift`."""
        memory = self._log.memory
        before, calls = _repeated.get(memory, (measured, 0))
        calls = calls + 1 if before == measured else 1
        _repeated[memory] = measured, calls
        if calls == _MANY:
            warn_once(
                "auto stands still",
                f"{self._auto!r} was told step {measured} for {calls} more backward passes. In a "
                "step that measures, each of them costs as much as ift. Unless these are "
                "micro-batches of one step, call dpp.set_step(model, step) in each training step. "
                "This is said once per run.",
                AssumptionWarning,
            )


_MANY = 100  # calls in one step, which no accumulation is likely to have
_repeated = weakref.WeakKeyDictionary[Memory, tuple[int, int]]()


@cache
def _strategy(spec: str) -> GradStrategy:
    return get_strategy(spec, {})


def _cosine(value: object) -> float:
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else 0.0
    if not 0 < number <= 1:
        raise ValueError(f"cosine={value!r}; expected a number in (0, 1]")
    return float(number)


def _methods(specs: object) -> tuple[GradStrategy, ...]:
    """Return the strategies of a user's list.

    Raises:
        ValueError: if it is none, or one of them is unknown, owns its solve, or changes with the
            step, or two have one name.
    """
    expected = "expected a list of specs such as ['jfb', 'npg(k=5)', 'ift']"
    if isinstance(specs, str) or not isinstance(specs, Sequence) or not specs:
        raise ValueError(f"methods={specs!r:.60}; {expected}")
    found = tuple(get_strategy(spec) for spec in specs)
    shown: dict[str, GradStrategy] = {}
    for strategy in found:
        if shown.setdefault(repr(strategy), strategy) != strategy:
            raise ValueError(
                f"methods: two are called {strategy!r}, and a choice is kept by its name; expected "
                "names that differ, such as those of registered strategies"
            )
        if strategy.owns_solve:
            raise ValueError(
                f"methods: {strategy!r} owns its solve, so its gradient is that of another state; "
                "expected methods that begin at an equilibrium, such as upg, npg, jfb or ift"
            )
        try:
            strategy.steps_ahead  # noqa: B018
        except ValueError as error:
            raise ValueError(
                f"methods: {strategy!r} changes with the training step, or draws, so what was "
                f"measured would not be what acts; expected strategies that stay the same ({error})"
            ) from None
    return found


def _say_without_memory(auto: Auto) -> None:
    warn_once(
        "auto without memory",
        f"{auto!r} has no memory to keep a choice in. So it computes the implicit gradient in each "
        "step, which costs as much as ift. Put a dpp.Memory into the context; hosts and "
        "dpp.Equilibrium have one. This is said once per run.",
        AssumptionWarning,
    )


def _say_untold(auto: Auto) -> None:
    warn_once(
        "auto without step",
        f"{auto!r} was not told the training step, so it measures once and never again; call "
        "dpp.set_step(model, step) in the training loop. This is said once per run.",
        AssumptionWarning,
    )
