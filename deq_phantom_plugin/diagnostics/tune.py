"""What `auto` would choose for a model, over several batches, without training."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

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
        model: the model's class.
        batches: how many were looked at.
        equilibria: one for each solve of a forward pass, in its order.
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
        """The spec for the whole model: of its equilibria's the one that costs most."""
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

    Before a training, or after a checkpoint was loaded: `dpp.set_grad(model, dpp.tune(...).spec)`.
    The model runs once in training mode for each batch. At each equilibrium the dL/dh that its
    current gradient method sends is what the methods are judged by; see `Auto` for how. The
    cosines are means of the batches, weighted by their samples; costs are the largest. The model,
    its buffers, `.grad` and the random state are left as they were.

    Args:
        model: its equilibria are found through the hosts.
        batches: inputs of the model: a tensor; a tuple or list of positional arguments; or a
            mapping of keyword arguments. Where `loss` takes two arguments, pairs of inputs and
            target.
        loss: from what the model returns, and the target if it takes one, to a scalar.
        cosine: see `Auto`.
        methods: see `Auto`.
        budget: see `Auto`.

    Returns:
        The report: tables when printed, `spec`, `specs`, `save_json`, `save_html`.

    Raises:
        ValueError: if there is no batch, the model has no equilibrium or refuses a batch, the loss
            is no scalar that depends on it or its gradient is not finite, or an argument is out of
            range.
    """
    auto = Auto(cosine, methods=methods, budget=budget)
    found = named_equilibria(model)
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError(f"no parameter of {type(model).__name__} requires grad")
    rows: dict[str, list[Numbers]] = {}
    count = 0
    with left_as_it_was(model), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it is in the table
        for inputs, of_output in _with_losses(batches, loss):
            count += 1
            for name, solve, v in solved(model, found, inputs, of_output)[1]:
                if v is not None:
                    rows.setdefault(name, []).append(_numbers(solve, v, params, auto))
    if not count:
        raise ValueError("batches is empty; expected at least one")
    name = type(getattr(model, "_orig_mod", model)).__name__  # of one that was compiled
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
                f"a batch is a {type(batch).__name__}; expected a pair (inputs, target), since "
                "loss takes two arguments"
            )
        inputs, target = batch
        yield inputs, partial(_with_target, loss, target)


def _with_target(loss: Callable[..., Tensor], target: Any, output: Any) -> Tensor:
    return loss(output, target)


def _takes_target(loss: Callable[..., Tensor]) -> bool:
    """Whether a loss has two arguments that it must be given."""
    function = loss.forward if isinstance(loss, nn.Module) else loss
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is p.empty for p in parameters) == 2


def _numbers(solve: Solve, v: list[Tensor], params: Sequence[Tensor], auto: Auto) -> Numbers:
    """Return what one solve says of the methods.

    Raises:
        ValueError: if the gradient that came to it is not finite.
    """
    if not all(bool(torch.isfinite(leaf).all()) for leaf in v):
        raise ValueError("the gradient of the loss is NaN or infinite in a batch")
    of_v = partial(inner_product, v)
    problem = Problem(solve.func, solve.equilibrium, of_v, params, solve.context)
    problem, _ = problem.settled(problem.inspect().coupled)
    runs = None
    if auto.strategies:
        runs = Runs(auto.strategies, problem.func, problem.equilibrium, problem.context)
    measured = reference(problem.linearize(), v, problem.context.sample_dim)
    return measured.numbers(auto.budget, runs)


def _tuned(name: str, own: Sequence[Numbers], auto: Auto) -> TunedEquilibrium:
    methods = described(auto.strategies) or built_in(auto.budget)
    found = together(methods, torch.stack([numbers.row() for numbers in own]))
    if not found.rows:
        raise ValueError(f"{name}: the loss does not depend on any sample, so nothing is judged")
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
