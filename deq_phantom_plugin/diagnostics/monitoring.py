"""Logs numbers on a model's equilibria while it trains, to TensorBoard or to any callable.

`monitor` observes each equilibrium through its host. Every few training steps it hangs a hook on
the state that was solved. In the backward pass the hook measures the gradient, see `health`, and
writes the numbers. Training is the same with and without a monitor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._plumbing.once import muted, warn
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
"""A function (numbers by name, step)."""


def monitor(model: nn.Module, writer: Any, every: int = DEFAULT_EVERY) -> Monitor:
    """Log the health of every equilibrium inside a model while it trains.

    Every `every` training steps it logs, in the backward pass, under the equilibrium's name:

    - `forward_residual`: ||F(h) - h|| / ||F(h)||, the mean of the batch. The number comes from the
      host's solver, or else from one evaluation of F.
    - `nfe`: the evaluations of F that the solve took.
    - `adjoint_residual`: ||v - (I - J^T) g|| / ||v|| of the g behind the model's own gradient.
    - `spectral_radius`: rho(J), the largest of the batch, from at most 20 products.
    - `cosine`: the cosine of the model's own dL/dtheta to a reference, which GMRES solves for with
      at most 30 products. In a model that was compiled as a whole it is the cosine of the gradients
      of what F captures: compiled code can be differentiated once only, and training does that.
    - `reference_residual`: the residual of that reference.
    - `forward_failures`, `adjoint_failures`: the number of samples in which solves have failed so
      far, as `guard` counts them; from the first failure on.
    - `chosen_cosine`, `chosen_cost`: the cosine and the cost of what `auto` had chosen, as in
      `dpp.report_choice`; from the first log after its first measurement.
    - `clipped`: the products that `clip` of `npg` or `ift` has shortened in this backward pass,
      each counted once per sample; from the first log in which there is one.

    Training is the same bit for bit with and without a monitor. Weights, `.grad`, random state and
    the buffers of all modules in F stay as they were. Between logs F is not evaluated once more.
    Only hooks on modules and parameters are called for a measurement, too. Compiled code is
    measured as it was written. Parameters whose gradient reaches F through compiled code are left
    out, with a warning. The step is that of `dpp.set_step`. Where nobody called it, forward passes
    in training are counted instead.

    Args:
        model: the model. Its equilibria are found through the hosts.
        writer: TensorBoard's `SummaryWriter`, or a callable (numbers by name, step), such as
            `wandb.log`.
        every: the number of training steps from one log to the next.

    Returns:
        A handle. `remove()` ends the monitor, and so does the end of a `with` block.

    Warns:
        UserWarning: if the model has no equilibrium; nothing is logged then. In training, if a
            measurement fails: training goes on.
        AssumptionWarning: in training, if F captures what compiled code returned.

    Raises:
        ValueError: if `every` is not a whole number of at least 1, or `writer` is neither a
            `SummaryWriter` nor a callable.
    """
    write, every = _as_callable(writer), positive_int("every", every)
    if not find_equilibria(model):
        warn(f"monitor: {what_is_found(model)} Nothing is logged.")
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
        ends: functions, each of which ends the observation of one equilibrium.
    """

    def __init__(self, ends: Sequence[Callable[[], None]]) -> None:
        self._ends = list(ends)

    def remove(self) -> None:
        """End the monitor. A second call does nothing."""
        while self._ends:
            self._ends.pop()()

    def __exit__(self, *error: object) -> None:
        self.remove()


@dataclass
class _Watch:
    """Observes the solves of one equilibrium, and logs their numbers.

    Args:
        name: the name of the equilibrium in the model.
        module: the equilibrium.
        model: the model, for its parameters.
        write: takes the numbers.
        every: the number of training steps from one log to the next.
    """

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
        if Trial.depth():  # a report measures, or an equilibrium whose F contains this one
            return
        self._forwards += solve.index == 0
        step = self._forwards if solve.step is None else solve.step
        # With gradient accumulation or repeated solves, a step comes here several times.
        if step % self.every or step == self._logged.get(solve.index):
            return
        attached = flatten(solve.attached)[0]
        places = [i for i, leaf in enumerate(attached) if leaf.requires_grad]
        leaves = [attached[i] for i in places]
        if not leaves:
            return
        self._logged[solve.index] = step
        name = self.name if solve.index == 0 else f"{self.name} #{solve.index + 1}"
        # The hook must not hold the attached state, which holds the hook: nothing would free them.
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
        """Measure in the backward pass, and write the numbers.

        Args:
            name: the name of the equilibrium, with the number of the solve if there are several.
            step: the training step.
            places: the positions of the leaves of the state that `grads` belong to.
            solve: the solve, without its attached state.
            grads: dL/dh, one tensor per place, or None where nothing arrived.
        """
        numbers = {"nfe": float(solve.nfe)}
        v = [torch.zeros_like(h) for h in flatten(solve.equilibrium)[0]]
        for i, grad in zip(places, grads, strict=True):
            v[i] = v[i] if grad is None else grad
        try:
            with solve.trial(), muted(ConvergenceWarning):
                numbers["forward_residual"] = float(solve.residual.mean())
                # An overflow from a loss scaler says nothing about the model.
                if all(bool(torch.isfinite(vi).all()) for vi in v):
                    params = [p for p in self.model.parameters() if p.requires_grad]
                    loss = partial(inner_product, v)
                    problem = Problem(solve.func, solve.equilibrium, loss, params, solve.context)
                    numbers |= health(self._short_of_compiled(problem, name), solve.strategy)
        except Exception as error:  # a measurement that fails must not stop the training
            warn(
                f"monitor: {name}, step {step}: {type(error).__name__}: {error}. Training goes on, "
                "and this log lacks what could not be measured",
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
        """Return the problem with gradients that end at compiled code. Warns once if some do."""
        short = problem.short_of_compiled()
        if short is not problem and not self._said:
            self._said = True
            warn(
                f"monitor: {name}: F captures what compiled code returned. Compiled code can be "
                "differentiated once only, and training does that. So the cosine is that of the "
                "gradients of what F captures, not of the parameters behind it. To have the cosine "
                "of all parameters, compile F alone",
                AssumptionWarning,
            )
        return short


def _chosen(module: nn.Module, index: int) -> dict[str, float]:
    """Return the numbers of what `auto` chose last for an equilibrium; none if it did not choose.

    Args:
        module: the equilibrium.
        index: the number of the solve among those of the module in one forward pass. Each solve
            may have a memory of its own.
    """
    memories = [m for m in module.modules() if isinstance(m, Memory)]
    found = choices(memories[min(index, len(memories) - 1)]) if memories else []
    if not found:
        return {}
    known = {"chosen_cosine": found[-1].cosine, "chosen_cost": found[-1].cost}
    return {key: value for key, value in known.items() if value is not None}


def _once(measure: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return a hook that measures the first time that it is called outside of a trial.

    Others call it, too. The measurement of an equilibrium that comes later in the model reaches
    back to this one. Products with the Jacobian of an outer F, which contains this equilibrium, go
    through it many times.
    """
    done = False

    def hook(grads: Any) -> None:
        nonlocal done
        if not done and not Trial.depth():
            done = True
            measure(grads)

    return hook


def _as_callable(writer: Any) -> Writer:
    """Return a writer as a function (numbers by name, step).

    Raises:
        ValueError: if it is neither a `SummaryWriter` nor a callable.
    """
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
