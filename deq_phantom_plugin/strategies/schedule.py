"""Schedule: another strategy from a given training step on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from .._plumbing.compilation import never_compiled
from ..contract.state import State
from ..contract.strategy import Context, GradStrategy
from .registry import Spec, get_strategy, register_strategy
from .told import in_steps, not_resolved, told_step


@register_strategy("schedule")
@dataclass(frozen=True, repr=False)
class Schedule(GradStrategy):
    """Switches strategy by training step, such as from unrolled pretraining to phantom gradients.

    Example: `"schedule({0: 'bptt(steps=5)', 20000: 'upg(k=5, lam=0.6)'})"` is the transition in
    section 4.3 of the supplement of "On Training Implicit Models".

    `dpp.set_step(model, step)`, or the host, tells the step. It is not counted from calls, so it is
    right under gradient accumulation. It is saved and resumed with the model. Until somebody tells
    it, it is taken to be 0, with a warning.

    Args:
        stages: from the step at which a stage begins to the spec of its strategy. One stage begins
            at 0. A float between 0 and 1 is a fraction of training, whose length
            `dpp.set_step(model, step, total=...)` tells. They are kept as sorted pairs.

    Raises:
        ValueError: if a step is neither a whole number of at least 0 nor such a fraction, if no
            stage begins at 0, or if a spec is invalid. In `resolve`, if a stage begins at a
            fraction and nobody has told the length of training.
    """

    stages: Mapping[int | float, Spec] | tuple[tuple[int | float, GradStrategy], ...]

    def __post_init__(self) -> None:
        expected = "expected a dict such as {0: 'bptt(steps=5)', 20000: 'upg'}"
        try:
            pairs = [(step, spec) for step, spec in dict(self.stages).items()]
        except (TypeError, ValueError):
            raise ValueError(f"stages={self.stages!r}; {expected}") from None
        for step, _ in pairs:
            if isinstance(step, bool) or not (
                0 < step < 1 if isinstance(step, float) else isinstance(step, int) and step >= 0
            ):
                raise ValueError(
                    f"step {step!r} in stages; expected whole numbers of at least 0, or fractions "
                    "of training between 0 and 1"
                )
        if 0 not in dict(pairs):
            raise ValueError(f"stages={self.stages!r} do not say what step 0 uses; {expected}")
        stages = tuple(sorted(((step, get_strategy(spec)) for step, spec in pairs), key=_start))
        object.__setattr__(self, "stages", stages)

    @never_compiled  # or for each step anew
    def resolve(self, context: Context) -> GradStrategy:
        """Return the strategy of the current step's stage."""
        step = told_step(context, repr(self)) if len(self._pairs) > 1 else 0
        begun = sorted(
            (in_steps(when, context, repr(self)), i) for i, (when, _) in enumerate(self._pairs)
        )
        active = [self._pairs[i][1] for start, i in begun if start <= step][-1]
        return active.resolve(context)

    @property
    def hands_out_states(self) -> bool:
        """Whether the strategies of all stages do."""
        return all(strategy.hands_out_states for _, strategy in self._pairs)

    @property
    def needs_inverse_jacobian(self) -> bool:
        """Whether the strategy of any stage does."""
        return any(strategy.needs_inverse_jacobian for _, strategy in self._pairs)

    @property
    def steps_ahead(self) -> int:
        """Not known: it depends on the step.

        Raises:
            ValueError: always.
        """
        raise not_resolved(self)

    def attach(self, func: Callable[[State], State], equilibrium: State, context: Context) -> State:
        """See `GradStrategy.attach`."""
        return self.resolve(context).attach(func, equilibrium, context)

    def states(
        self, func: Callable[[State], State], equilibrium: State, context: Context
    ) -> Iterator[State]:
        """Yield the states of the current stage's strategy."""
        return self.resolve(context).states(func, equilibrium, context)

    @property
    def _pairs(self) -> tuple[tuple[int | float, GradStrategy], ...]:
        assert isinstance(self.stages, tuple)
        return self.stages

    def __repr__(self) -> str:
        stages = {start: repr(strategy) for start, strategy in self._pairs}
        return f"{self.name}({stages!r})"


def _start(stage: tuple[int | float, GradStrategy]) -> int | float:
    return stage[0]
