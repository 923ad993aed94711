"""A report on the strategies at one equilibrium: how exact each gradient is, and what it costs.

`gradient_report` measures strategies against a reference gradient (`measure/`). The result prints
as a table, and can be saved as JSON or as a page (`show/`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from .._plumbing.trial import Trial
from ..contract.state import State
from ..contract.strategy import Context
from ..strategies.arguments import positive_int
from ..strategies.registry import Spec, get_strategy
from .measure.derivatives import check_params
from .measure.gradients import measure
from .measure.problem import Problem
from .measure.results import Measurement, StrategyResult
from .show.html import page
from .show.recommendation import recommend
from .show.saved import Saved
from .show.text import as_text

__all__ = ["DEFAULT_GRADS", "GradientReport", "StrategyResult", "gradient_report"]

DEFAULT_GRADS: tuple[str, ...] = ("ift", "upg", "npg", "jfb")


@dataclass(frozen=True)
class GradientReport(Measurement, Saved):
    """What every strategy does on one equilibrium; `print` shows a table.

    The numbers are those of a `Measurement`.

    Attributes:
        recommendation: what follows from the numbers, in sentences.
    """

    recommendation: list[str]

    def __str__(self) -> str:
        return as_text(self, self.recommendation)

    def _page(self) -> str:
        return page([(self, self.recommendation)], self.name)


def gradient_report(
    func: Callable[[State], State],
    equilibrium: State,
    loss: Callable[[State], Tensor],
    params: Iterable[Tensor],
    grads: Sequence[Spec] = DEFAULT_GRADS,
    *,
    context: Context | None = None,
    repeats: int = 3,
    second_order: bool = False,
) -> GradientReport:
    """Measure strategies on your own equilibrium against a reference gradient.

    Random state, and the buffers of all modules that run in F, are left as they were.

    The reference is a dense solve up to 1024 elements per sample. Beyond, it is GMRES to a relative
    residual of 1e-8, or ten roundings of the state's dtype if that is more. Where GMRES stalls, a
    dense solve is tried, if the matrices fit into 1 GiB. The report shows the reference's residual.

    A `func` that was compiled is measured as it was written, since compiled code can be
    differentiated once only. The times are those of the uncompiled code, too.

    Args:
        func: F, from a state to a state of the same structure, as for `dpp.attach`.
        equilibrium: h*, detached.
        loss: a function from a state to a scalar.
        params: the tensors to differentiate with respect to: those that F captures, or is built
            from. Only the gradient that flows through the equilibrium counts. Nothing is added to
            their `.grad`.
        grads: specs of the strategies.
        context: what the strategies may know, such as `batch_dim`, which is found out by default.
        repeats: the number of timed runs per strategy, in turns. Their medians are reported.
        second_order: whether to compare second derivatives as well: the gradient of <dL/dtheta, w>
            for a random w, with that of `ift(higher_order=True)`. Not all strategies have one.
            That of `upg` and `jfb` is the derivative of their own steps.

    Returns:
        The report: a table when printed, `save_json`, `save_html`.

    Raises:
        ValueError: if a spec, the equilibrium, the loss or `params` is invalid. A strategy that
            fails while it is measured has its error in its row instead.
    """
    problem = Problem(func, equilibrium, loss, check_params(params), context or Context())
    for spec in grads:
        get_strategy(spec)
    repeats = positive_int("repeats", repeats)
    with Trial(equilibrium):
        return advised(
            measure(problem, grads, repeats, name="equilibrium", second_order=second_order)
        )


def advised(measured: Measurement) -> GradientReport:
    """Return a measurement as a report, with advice."""
    return GradientReport(**vars(measured), recommendation=recommend(measured))
