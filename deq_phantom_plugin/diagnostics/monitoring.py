"""The health of a model's equilibria while it trains, into TensorBoard or any callable."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._plumbing.once import muted
from .._plumbing.trial import Trial
from ..contract.errors import AssumptionWarning, ConvergenceWarning
from ..contract.memory import Memory
from ..contract.state import flatten
from ..hosts import find_equilibria, what_is_found
from ..hosts.solve import Solve
from ..strategies.arguments import positive_int
from ..strategies.noted import choices
from ..switch import failures
from .measure.equilibria import named_equilibria
from .measure.health import health
from .measure.problem import Problem, inner_product

DEFAULT_EVERY = 200

Writer = Callable[[Mapping[str, float], int], Any]
"""Takes numbers by name, and the step."""


def monitor(model: nn.Module, writer: Any, every: int = DEFAULT_EVERY) -> Monitor:
    """Log the health of every equilibrium inside a model while it trains.

    Every `every` training steps, in the backward pass, under the equilibrium's name:

    - `forward_residual`: ||F(h) - h|| / ||F(h)||, the mean of the batch, as the host's solver has
      it or else from one evaluation;
    - `nfe`: evaluations of F that the solve took;
    - `adjoint_residual`: ||v - (I - J^T) g|| / ||v|| of the g behind the model's own gradient;
    - `spectral_radius`: rho(J), the largest of the batch, from at most 20 products;
    - `cosine`: of the model's own dL/dtheta to that of a better reference, GMRES with at most 30
      products, whose own residual is `reference_residual`. In a model that was compiled as a
      whole, of the gradients of what F captures: those go through compiled code once, in training;
    - `forward_failures`, `adjoint_failures`: samples in which solves have failed so far, as `guard`
      counted them, once there is one;
    - `chosen_cosine`, `chosen_cost`: of what `auto` had chosen, as `dpp.report_choice` tells it,
      from the first log after its first measurement;
    - `clipped`: products that `clip` of `npg` or `ift` has shortened in this backward pass, each
      counted once per sample, from the first log in which there is one.

    Training is the same bit for bit with and without it: weights, `.grad`, random state and the
    buffers of all modules in F, as batch norms have them, are left as they were, and between logs F
    is not evaluated once more. Only hooks on modules and parameters are called for the
    evaluations and products of a measurement too. What was compiled is measured as it was written;
    parameters whose gradient comes to F through compiled code are left out, with a warning.
    The step is that of `dpp.set_step`; where it was never called, training forward passes are
    counted instead.

    Args:
        model: its equilibria are found through the hosts.
        writer: TensorBoard's `SummaryWriter`, or a callable (numbers by name, step), such as
            `wandb.log`.
        every: steps from one log to the next.

    Returns:
        A handle: `remove()` ends it, and so does leaving it as a `with` block.

    Warns:
        UserWarning: if the model has no equilibrium; says what would be found, and logs nothing.

    Raises:
        ValueError: if `every` is not a whole number of at least 1, or `writer` is neither.
    """
    write, every = _as_callable(writer), positive_int("every", every)
    if not find_equilibria(model):
        warnings.warn(f"monitor: {what_is_found(model)} Nothing is logged.", stacklevel=2)
        return Monitor([])
    return Monitor(
        [
            host.observe(module, _Watch(name, module, model, write, every))
            for name, host, module in named_equilibria(model)
        ]
    )


class Monitor(AbstractContextManager["Monitor"]):
    """A handle on a running monitor.

    Args:
        ends: functions that end its observations.
    """

    def __init__(self, ends: Sequence[Callable[[], None]]) -> None:
        self._ends = list(ends)

    def remove(self) -> None:
        """End the monitor; idempotent."""
        while self._ends:
            self._ends.pop()()

    def __exit__(self, *error: object) -> None:
        self.remove()


@dataclass
class _Watch:
    """Logs one equilibrium."""

    name: str
    module: nn.Module
    model: nn.Module
    write: Writer
    every: int
    _forwards: int = field(default=-1, init=False)
    _logged: dict[int, int] = field(default_factory=dict, init=False)
    _said: bool = field(default=False, init=False)
    _clips: bool = field(default=False, init=False)

    def __call__(self, solve: Solve) -> None:
        if Trial.depth():  # of a report, or of an equilibrium whose F this one is inside of
            return
        self._forwards += solve.index == 0
        step = self._forwards if solve.step is None else solve.step
        # Gradient accumulation and repeated solves come here several times a step.
        if step % self.every or step == self._logged.get(solve.index):
            return
        attached = flatten(solve.attached)[0]
        places = [i for i, leaf in enumerate(attached) if leaf.requires_grad]
        leaves = [attached[i] for i in places]
        if not leaves:
            return
        self._logged[solve.index] = step
        name = self.name if solve.index == 0 else f"{self.name} #{solve.index + 1}"
        # Without the attached state, which would hold the hook that holds it.
        backward = partial(self._on_backward, name, step, places, replace(solve, attached=None))
        torch.autograd.graph.register_multi_grad_hook(leaves, _once(backward))

    def _on_backward(
        self,
        name: str,
        step: int,
        places: Sequence[int],
        solve: Solve,
        grads: Sequence[Tensor | None],
    ) -> None:
        numbers = {"nfe": float(solve.nfe)}
        v = [torch.zeros_like(h) for h in flatten(solve.equilibrium)[0]]
        for i, grad in zip(places, grads, strict=True):
            v[i] = v[i] if grad is None else grad
        try:
            with solve.trial(), muted(ConvergenceWarning):
                numbers["forward_residual"] = float(solve.residual.mean())
                # A loss scaler's overflow says nothing about the model.
                if all(bool(torch.isfinite(vi).all()) for vi in v):
                    params = [p for p in self.model.parameters() if p.requires_grad]
                    loss = partial(inner_product, v)
                    problem = Problem(solve.func, solve.equilibrium, loss, params, solve.context)
                    numbers |= health(self._short_of_compiled(problem, name), solve.strategy)
        except Exception as error:  # what is only watched must not stop the training
            warnings.warn(
                f"monitor: {name}, step {step}: {type(error).__name__}: {error}", stacklevel=2
            )
        self._clips |= numbers.get("clipped", 0) > 0
        if not self._clips:
            numbers.pop("clipped", None)
        counts = failures(self.module)
        if any(counts.values()):
            numbers |= {f"{kind}_failures": float(n) for kind, n in counts.items()}
        numbers |= _chosen(self.module, solve.index)
        finite = {f"{name}/{key}": x for key, x in numbers.items() if x == x}
        self.write(finite, step)

    def _short_of_compiled(self, problem: Problem, name: str) -> Problem:
        short = problem.short_of_compiled()
        if short is not problem and not self._said:
            self._said = True
            warnings.warn(
                f"monitor: {name}: F captures what compiled code returned, and only training can "
                "go back through that: the cosine is that of the gradients of what F captures, not "
                "of the parameters behind it. Compile F alone to have it of all parameters",
                AssumptionWarning,
                stacklevel=2,
            )
        return short


def _chosen(module: nn.Module, index: int) -> dict[str, float]:
    """Return the numbers of what `auto` chose last for an equilibrium; none if it did not choose.

    Args:
        module: the equilibrium.
        index: which of those that it finds in one forward pass; each may have its own memory.
    """
    memories = [m for m in module.modules() if isinstance(m, Memory)]
    found = choices(memories[min(index, len(memories) - 1)]) if memories else []
    if not found:
        return {}
    known = {"chosen_cosine": found[-1].cosine, "chosen_cost": found[-1].cost}
    return {key: value for key, value in known.items() if value is not None}


def _once(measure: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return a hook that measures the first time, and not in a trial.

    The measurement of an equilibrium that comes later in the model reaches back here, and products
    with the Jacobian of one whose F this one is inside of come through many times.
    """
    done = False

    def hook(grads: Any) -> None:
        nonlocal done
        if not done and not Trial.depth():
            done = True
            measure(grads)

    return hook


def _as_callable(writer: Any) -> Writer:
    add_scalar = getattr(writer, "add_scalar", None)
    if callable(add_scalar):

        def write(numbers: Mapping[str, float], step: int) -> None:
            for name, value in numbers.items():
                add_scalar(name, value, step)

        return write
    if not callable(writer):
        raise ValueError(
            f"writer={writer!r}; expected a SummaryWriter or a callable (numbers by name, step)"
        )
    return writer  # type: ignore[no-any-return]
