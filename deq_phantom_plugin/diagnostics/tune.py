"""Chooses a gradient method for a model as `auto` does, over several batches, without training.

The model runs once per batch. At each solve the implicit gradient is computed as a reference, and
all methods are judged against it. The numbers of the batches are put together as `auto` puts those
of several processes together, and its rule decides.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._plumbing.once import muted
from ..contract.errors import ConvergenceWarning
from ..hosts.solve import Solve
from ..strategies import Auto
from ..strategies.candidates import Runs, built_in, described
from ..strategies.choice import Choice, Numbers, together
from ..strategies.measurement import reference
from ..strategies.registry import Spec
from .measure.equilibria import left_as_it_was, named_equilibria, solved
from .measure.problem import Problem, inner_product
from .measure.results import TunedEquilibrium
from .show.saved import Saved
from .show.tuning import tuning_page, tuning_text


@dataclass(frozen=True)
class TuneReport(Saved):
    """What `auto` would choose at each equilibrium of a model; `print` shows tables.

    Attributes:
        model: the name of the model's class.
        batches: the number of batches that were looked at.
        equilibria: the result for each solve of a forward pass, in the order of the solves.
    """

    model: str
    batches: int
    equilibria: list[TunedEquilibrium]

    @property
    def specs(self) -> dict[str, str]:
        """The spec of each equilibrium, by its name."""
        return {found.name: found.spec for found in self.equilibria}

    @property
    def spec(self) -> str:
        """The spec for the whole model: the one of its equilibrium whose choice costs most."""
        return max(self.equilibria, key=lambda found: found.cost or 0.0).spec

    def __str__(self) -> str:
        return tuning_text(self._title, self.equilibria, self.spec)

    @property
    def _title(self) -> str:
        return f"{self.model}, {self.batches} batch" + ("es" if self.batches > 1 else "")

    def _page(self) -> str:
        return tuning_page(self._title, self.equilibria, self.spec)


def tune(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[..., Tensor],
    *,
    cosine: float = 0.95,
    methods: Sequence[Spec] | None = None,
    budget: int | None = None,
) -> TuneReport:
    """Choose a gradient method for a model as `auto` does, over several batches, without training.

    Use it before a training, or after a checkpoint was loaded:
    `dpp.set_grad(model, dpp.tune(...).spec)`. The model runs once in training mode for each batch.
    At each equilibrium the methods are judged on the dL/dh that the model's current methods send
    there; `Auto` says how. A method's cosine is the mean over the batches, weighted by their
    samples. Its cost is the largest of all batches. The model, its buffers, `.grad` and the random
    state are left as they were.

    Args:
        model: its equilibria are found through the hosts.
        batches: inputs of the model: a tensor; a tuple or list of positional arguments; or a
            mapping of keyword arguments. Where `loss` takes two arguments, each batch is a pair
            of inputs and target.
        loss: a function from what the model returns, and the target if it takes one, to a scalar.
        cosine: see `Auto`.
        methods: see `Auto`.
        budget: see `Auto`.

    Returns:
        The report: tables when printed, `spec`, `specs`, `save_json`, `save_html`.

    Raises:
        ValueError: if there is no batch; if the model has no equilibrium, has no parameter that
            requires grad, or refuses a batch; if the loss is no scalar that depends on an
            equilibrium, or its gradient is not finite; if an argument is out of range.
    """
    auto = Auto(cosine, methods=methods, budget=budget)
    found = named_equilibria(model)
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError(
            f"no parameter of {type(model).__name__} requires grad, so there is no gradient to "
            "judge; call requires_grad_() on those that are trained"
        )
    rows: dict[str, list[Numbers]] = {}
    count = 0
    with left_as_it_was(model), muted(ConvergenceWarning):  # the table shows it
        for inputs, of_output in _with_losses(batches, loss):
            count += 1
            for name, solve, v in solved(model, found, inputs, of_output)[1]:
                if v is not None:
                    rows.setdefault(name, []).append(_numbers(solve, v, params, auto))
    if not count:
        raise ValueError("batches is empty; expected at least one batch")
    name = type(getattr(model, "_orig_mod", model)).__name__  # of the model that was compiled
    return TuneReport(name, count, [_tuned(name, own, auto) for name, own in rows.items()])


def _with_losses(
    batches: Iterable[Any], loss: Callable[..., Tensor]
) -> Iterable[tuple[Any, Callable[[Any], Tensor]]]:
    """Yield the inputs of each batch and the loss as a function of the output."""
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise ValueError(
            f"batches is a {type(batches).__name__}; expected a sequence of batches, such as [x]"
        )
    if not _takes_target(loss):
        yield from ((batch, loss) for batch in batches)
        return
    for batch in batches:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ValueError(
                f"loss takes two arguments, and a batch is a {type(batch).__name__}; expected a "
                "pair (inputs, target)"
            )
        inputs, target = batch
        yield inputs, partial(_with_target, loss, target)


def _with_target(loss: Callable[..., Tensor], target: Any, output: Any) -> Tensor:
    return loss(output, target)


def _takes_target(loss: Callable[..., Tensor]) -> bool:
    """Whether a loss has two arguments without a default."""
    function = loss.forward if isinstance(loss, nn.Module) else loss
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is p.empty for p in parameters) == 2


def _numbers(solve: Solve, v: list[Tensor], params: Sequence[Tensor], auto: Auto) -> Numbers:
    """Judge the methods on one solve.

    Args:
        solve: the solve.
        v: dL/dh at the solve, one tensor per leaf of the state.
        params: the parameters of the model.
        auto: holds the methods and the budget.

    Raises:
        ValueError: if v is not finite.
    """
    if not all(bool(torch.isfinite(leaf).all()) for leaf in v):
        raise ValueError(
            "dL/dh at an equilibrium is NaN or infinite in a batch, so no method can be judged; "
            "leave the batch out, or mend the loss"
        )
    of_v = partial(inner_product, v)
    problem = Problem(solve.func, solve.equilibrium, of_v, params, solve.context)
    problem, _ = problem.settled(problem.inspect().coupled)
    runs = None
    if auto.strategies:
        runs = Runs(auto.strategies, problem.func, problem.equilibrium, problem.context)
    measured = reference(problem.linearize(), v, problem.context.sample_dim)
    return measured.numbers(auto.budget, runs)


def _tuned(name: str, own: Sequence[Numbers], auto: Auto) -> TunedEquilibrium:
    """Put the numbers of all batches together, and choose.

    Raises:
        ValueError: if dL/dh is zero in every sample.
    """
    methods = described(auto.strategies) or built_in(auto.budget)
    found = together(methods, torch.stack([numbers.row() for numbers in own]))
    if not found.rows:
        raise ValueError(
            f"{name}: dL/dh is zero in every sample, so no method can be judged; expected batches "
            "in which the loss depends on the equilibrium"
        )
    choice: Choice = auto.rule.decide(found, None, 0)[0]
    shown = [
        c
        for c in found.candidates
        if c.spec == choice.spec or (found.contracts(c) and found.is_bounded(c))
    ]
    return TunedEquilibrium(
        name,
        found.rows,
        choice.spec,
        choice.cosine,
        choice.cost,
        choice.why,
        shown if found.supported > 0 else [],
    )
