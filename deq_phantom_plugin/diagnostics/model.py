"""A report on every equilibrium inside a model.

The model runs once. Each solve of that forward pass is then measured by itself, with the dL/dh that
reaches it in the backward pass. The measurements are those of `gradient_report`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from .._plumbing.once import warn
from ..strategies.arguments import positive_int
from ..strategies.registry import Spec, get_strategy
from .measure.equilibria import left_as_it_was, named_equilibria, solved
from .measure.gradients import measure
from .measure.problem import Problem, inner_product
from .report import DEFAULT_GRADS, GradientReport, advised
from .show.html import page
from .show.saved import Saved


@dataclass(frozen=True)
class ModelReport(Saved):
    """The reports on all equilibria of a model; `print` shows their tables.

    Attributes:
        model: the name of the model's class.
        loss: the value of the loss on the inputs.
        reports: one report per solve of the forward pass, in the order of the solves.
    """

    model: str
    loss: float
    reports: list[GradientReport]

    def __str__(self) -> str:
        return "\n\n".join([self._title, *(str(report) for report in self.reports)])

    @property
    def _title(self) -> str:
        return f"{self.model}, loss {self.loss:.4g}"

    def _page(self) -> str:
        return page([(report, report.recommendation) for report in self.reports], self._title)


def model_report(
    model: nn.Module,
    inputs: Any,
    loss: Callable[[Any], Tensor],
    grads: Sequence[Spec] = DEFAULT_GRADS,
    *,
    repeats: int = 3,
) -> ModelReport:
    """Measure strategies on every equilibrium inside a model, see `gradient_report`.

    The model runs once in training mode. Each equilibrium that it solves is then measured by
    itself, with the dL/dh that the model's current methods send there. The current method gets a
    row, too. The gradient is that of all parameters on which F depends, also those of the
    injection. Compiled code runs as it was written, since it can be differentiated once only.
    Buffers of the model and of all modules in F, `.grad` and the random state stay as they were.

    Args:
        model: its equilibria are found through the hosts.
        inputs: a tensor; a tuple or list of positional arguments; or a mapping of keyword
            arguments.
        loss: a function from what the model returns to a scalar.
        grads: specs of the strategies.
        repeats: the number of timed runs per strategy, in turns. Their medians are reported.

    Warns:
        UserWarning: for each equilibrium on which the loss does not depend; it is left out.

    Raises:
        ValueError: if the model has no equilibrium, has no parameter that requires grad, or refuses
            the inputs; if the loss is no scalar that depends on an equilibrium; if a spec is
            invalid. If a strategy fails while it is measured, its row holds the error instead.
    """
    strategies = [get_strategy(spec) for spec in grads]
    repeats = positive_int("repeats", repeats)
    found = named_equilibria(model)
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError(
            f"no parameter of {type(model).__name__} requires grad, so there is no gradient to "
            "measure; call requires_grad_() on those that are trained"
        )
    reports = []
    with left_as_it_was(model):
        value, solves = solved(model, found, inputs, loss)
        for name, solve, v in solves:
            if v is None:
                text = f"{name} is left out of the report: the loss does not depend on it"
                warn(text)
                continue
            of_v = partial(inner_product, v)
            problem = Problem(solve.func, solve.equilibrium, of_v, params, solve.context)
            current = [] if solve.strategy in strategies else [solve.strategy]
            measured = measure(problem, [*current, *grads], repeats, name=name, nfe=solve.nfe)
            reports.append(advised(measured))
    name = type(
        getattr(model, "_orig_mod", model)
    ).__name__  # the name of a compiled model's own class
    return ModelReport(name, value.item(), reports)
