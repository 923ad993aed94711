"""The report on every equilibrium inside a model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._plumbing.output import write_whole
from .._plumbing.trial import Trial
from ..contract.memory import Memory
from ..contract.state import flatten
from ..hosts.solve import Solve
from ..strategies.arguments import positive_int
from ..strategies.registry import Spec, get_strategy
from .derivatives import check_params
from .equilibria import named_equilibria
from .problem import Problem, check_scalar, inner_product
from .report import DEFAULT_GRADS, GradientReport, measure


@dataclass(frozen=True)
class ModelReport:
    """The reports on all equilibria of a model; `print` shows their tables.

    Attributes:
        model: the model's class.
        loss: its value on the inputs.
        reports: one for each solve of the forward pass, in its order.
    """

    model: str
    loss: float
    reports: list[GradientReport]

    def __str__(self) -> str:
        head = f"{self.model}, loss {self.loss:.4g}"
        return "\n\n".join([head, *(str(report) for report in self.reports)])

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers in types that JSON has; NaN and infinity become None."""
        reports = [report.to_dict() for report in self.reports]
        return {"model": self.model, "loss": self.loss, "reports": reports}

    def save_json(self, path: str | Path) -> None:
        """Write all numbers to a file, whole or not at all."""
        write_whole(path, json.dumps(self.to_dict(), indent=1).encode())

    def save_html(self, path: str | Path) -> None:
        """Write one self-contained page with tables and plots, whole or not at all.

        Raises:
            ImportError: without matplotlib.
        """
        from .html import page

        write_whole(path, page(self.reports, f"{self.model}, loss {self.loss:.4g}").encode())


def model_report(
    model: nn.Module,
    inputs: Any,
    loss: Callable[[Any], Tensor],
    grads: Sequence[Spec] = DEFAULT_GRADS,
    *,
    repeats: int = 3,
) -> ModelReport:
    """Measure strategies on every equilibrium inside a model; see `gradient_report`.

    The model runs once in training mode. Each equilibrium that it solves is then measured by
    itself, with the dL/dh that the model's current gradient method sends it; that method gets a row
    of its own. The gradient is that of all parameters which F depends on, those of the
    injection included. What was compiled runs as it was written, since its derivatives are taken
    more than once. The model, its buffers and those of all modules in F, `.grad` and the random
    state are left as they were.

    Args:
        model: its equilibria are found through the hosts.
        inputs: a tensor; a tuple or list of positional arguments; or a mapping of keyword
            arguments.
        loss: from what the model returns to a scalar.
        grads: specs of the strategies.
        repeats: timed runs of each strategy, interleaved; their medians are reported.

    Raises:
        ValueError: if the model has no equilibrium or no parameter that requires grad, refuses the
            inputs, or the loss is not a scalar that depends on it; if a spec is invalid. A strategy
            that fails on the way has its error in its row instead.
    """
    strategies = [get_strategy(spec) for spec in grads]
    repeats = positive_int("repeats", repeats)
    found = named_equilibria(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(f"no parameter of {type(model).__name__} requires grad")
    params = check_params(trainable)
    with _left_as_it_was(model):
        solves: list[tuple[str, Solve]] = []
        ends = [
            host.observe(module, partial(_collect, solves, name)) for name, host, module in found
        ]
        try:
            output = _call(model, inputs)
        finally:
            for end in ends:
                end()
        value = check_scalar(loss(output))
        reports = []
        for (name, solve), v in zip(solves, _cotangents(value, solves), strict=True):
            if v is None:
                warnings.warn(f"{name} is left out: the loss does not depend on it", stacklevel=2)
                continue
            problem = Problem(
                solve.func,
                solve.equilibrium,
                partial(inner_product, v),
                params,
                solve.context,
            )
            current = [] if solve.strategy in strategies else [solve.strategy]
            reports.append(
                measure(problem, [*current, *strategies], repeats, name=name, nfe=solve.nfe)
            )
    name = type(getattr(model, "_orig_mod", model)).__name__  # of one that was compiled
    return ModelReport(name, value.item(), reports)


def _collect(solves: list[tuple[str, Solve]], name: str, solve: Solve) -> None:
    number = 1 + sum(known.partition(" #")[0] == name for known, _ in solves)
    solves.append((name if number == 1 else f"{name} #{number}", solve))


def _call(model: nn.Module, inputs: Any) -> Any:
    try:
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)
    except Exception as error:
        leaves = flatten(dict(inputs) if isinstance(inputs, Mapping) else inputs)[0]
        shapes = ", ".join(
            str(tuple(leaf.shape)) if isinstance(leaf, Tensor) else type(leaf).__name__
            for leaf in leaves
        )
        raise ValueError(
            f"{type(model).__name__} refused its inputs ({shapes}): {type(error).__name__}: {error}"
        ) from error


def _cotangents(loss: Tensor, solves: list[tuple[str, Solve]]) -> list[list[Tensor] | None]:
    """Return dL/dh for each solve, None where the loss does not depend on it.

    Raises:
        ValueError: if it depends on none.
    """
    states = [flatten(solve.attached)[0] for _, solve in solves]
    leaves = [leaf for state in states for leaf in state]
    grads: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if leaves and loss.requires_grad:
        grads = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
    if all(grad is None for grad in grads):
        raise ValueError(
            f"the loss depends on none of the {len(solves)} equilibria that the model solved"
        )
    found: list[list[Tensor] | None] = []
    remaining = iter(zip(grads, leaves, strict=True))
    for state in states:
        own = [next(remaining) for _ in state]
        known = any(grad is not None for grad, _ in own)
        filled = [torch.zeros_like(x) if grad is None else grad for grad, x in own]
        found.append(filled if known else None)
    return found


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Put a model in training mode if it is not; restore all that a forward pass changes."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    memories = [(m, m.step, m.kept()) for m in model.modules() if isinstance(m, Memory)]
    with Trial([*model.parameters()]):
        if not model.training:
            model.train()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            with torch.no_grad():
                for buffer, saved in buffers:
                    buffer.copy_(saved)
            for memory, step, kept in memories:
                memory.step = step
                memory.restore(kept)
