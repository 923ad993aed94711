"""How each library does the work, and the floors: hand-written loops with nothing around them."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.extras import why_not
from deq_phantom_plugin.contract.state import State

from .contest import Unavailable
from .timing import Run
from .work import Problem

# --- ours -------------------------------------------------------------------------------------


def strategy(spec: str) -> dpp.GradStrategy:
    """Return a strategy of this package.

    Raises:
        Unavailable: if it has none of that name or with those arguments.
    """
    try:
        return dpp.get_strategy(spec)
    except ValueError as error:
        raise Unavailable(str(error).partition("\n")[0]) from None


def attached(problem: Problem, spec: str, context: dpp.Context | None = None) -> Run:
    """Attach one of our strategies to the state as it is, and go back."""
    named = strategy(spec)
    return lambda: problem.backward(dpp.attach(problem.func, problem.equilibrium, named, context))


# --- TorchDEQ ---------------------------------------------------------------------------------


def torchdeq(**settings: Any) -> Any:
    """Return TorchDEQ's module, hooked by us: integers and `ift=True` run its own code.

    Raises:
        Unavailable: without TorchDEQ, or if it has no solver of that name.
    """
    if why := why_not("torchdeq"):
        raise Unavailable(why)
    dpp.enable("torchdeq")
    from torchdeq import get_deq
    from torchdeq.solver import _solvers

    for key in ("f_solver", "b_solver"):
        if settings.get(key, "anderson") not in _solvers:
            raise Unavailable(f"{key}={settings[key]!r} is not in TorchDEQ's table")
    if isinstance(settings.get("grad"), str):
        strategy(settings["grad"])
    return get_deq(settings).train()


def seam(problem: Problem, no_stat: bool = False, **settings: Any) -> Run:
    """Attach in TorchDEQ's module, and go back; its forward solver returns where it starts.

    Args:
        problem: the work.
        no_stat: TorchDEQ's setting of that name: a list of tensors stays a list.
        **settings: of `get_deq`; `grad` may be an integer (TorchDEQ's own) or a name (ours).
    """
    deq = torchdeq(no_stat=no_stat, **settings)
    deq.f_solver = _where_it_starts

    def run() -> None:
        states, _ = deq(problem.spread, problem.equilibrium)
        problem.backward(states[-1])

    return run


def _where_it_starts(func: Callable, x0: Any, **settings: Any) -> tuple[Any, list[Any], Any]:
    from torchdeq.solver.stat import SolverStat

    return x0, [x0], SolverStat()


def evaluations(solver: str, n: int) -> int:
    """Return the `max_iter` at which a solver of TorchDEQ's table evaluates f `n` times."""
    return n - 1 if solver.startswith("broyden") else n


# --- silva-networks ---------------------------------------------------------------------------


class Silva(nn.Module):
    """silva-networks' engine in the place of TorchDEQ's module.

    Args:
        parameters: what gradients are for, other than the state.
        **settings: of `SolverConfig`.
    """

    def __init__(self, parameters: Iterable[Tensor], **settings: Any) -> None:
        super().__init__()
        if why := why_not("silva_networks"):
            raise Unavailable(f"{why}: make bench-silva")
        from silva_networks.deq_engine import SILVADEQEngine
        from silva_networks.solvers import SolverConfig

        # A tolerance must be positive; this one is never met, so the iterations are as many as
        # they are for the others. Recording residuals cannot be had cheaper: it computes them
        # for its stopping test anyway.
        config = SolverConfig(tol=1e-30, backward_tol=1e-30, **settings)
        self._engine = [SILVADEQEngine(config)]  # in a list: not part of anybody's model
        self._tensors = tuple(parameters)

    def forward(self, func: Callable[..., Any], start: State) -> tuple[list[State], Any]:
        """Solve and attach."""
        single = isinstance(start, Tensor)
        state = self._engine[0](
            func if single else lambda leaves: list(func(*leaves)), start, tensors=self._tensors
        )
        return [state], {"rel_lowest": torch.zeros(1)}


# --- foreign checkouts ------------------------------------------------------------------------


def checkout(repository: str, folder: str) -> Path:
    """Return a folder of a checkout in `.hosts`, or in the folder that DEQ_PHANTOM_HOSTS names.

    Raises:
        Unavailable: if it is not there.
    """
    hosts = Path(os.environ.get("DEQ_PHANTOM_HOSTS", Path(__file__).parents[2] / ".hosts"))
    found = hosts / repository.partition("/")[2] / folder
    if not found.is_dir():
        raise Unavailable(f"no checkout of {repository} in .hosts or DEQ_PHANTOM_HOSTS")
    return found


class PhantomGrad(nn.Module):
    """The layer of Gsunshine/phantom_grad, whose paper's code it is, in TorchDEQ's place.

    Args:
        k: its `pg_steps`.
        lam: its `tau`.
        updates: of its Broyden solve; None for a solve that returns where it starts.
    """

    def __init__(self, k: int, lam: float, updates: int | None) -> None:
        super().__init__()
        lib = checkout("Gsunshine/phantom_grad", "MDEQ/MDEQ_CIFAR/lib")
        if str(lib) not in sys.path:
            sys.path.append(str(lib))
        # Not as a part of its package, which imports the models too.
        spec = importlib.util.spec_from_file_location(
            "phantom_grad_layer", lib / "models" / "mdeq_forward_backward.py"
        )
        assert spec is not None
        assert spec.loader is not None
        layer = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(layer)
        except ImportError as error:
            raise Unavailable(f"Gsunshine/phantom_grad: {error}") from None
        if updates is None:
            layer.DEQFunc2d = SimpleNamespace(apply=lambda func, leaves, *rest: leaves)
        self._layer = [layer.MDEQWrapper(None, lam, k)]  # in a list: not part of anybody's model
        self._updates = updates

    def forward(self, func: Callable[..., Any], start: State) -> tuple[list[State], Any]:
        """Solve and attach."""
        if isinstance(start, Tensor):
            raise Unavailable("a list of images only")
        layer = self._layer[0].train(self.training)
        layer.func = lambda leaves, *rest: list(func(*leaves))
        state = layer(start, start[0], threshold=self._updates)  # any injection: f has its own
        return [state], {"rel_lowest": torch.zeros(1)}


# --- floors -----------------------------------------------------------------------------------


def upg_floor(problem: Problem, k: int, lam: float) -> Run:
    """Take k damped steps and go back, by hand."""

    def run() -> None:
        state = problem.equilibrium
        leaves, structure = tree_flatten(state)
        for _ in range(k):
            images = tree_leaves(problem.func(state))
            leaves = [torch.lerp(h, f, lam) for h, f in zip(leaves, images, strict=True)]
            state = tree_unflatten(leaves, structure)
        problem.backward(state)

    return run


def npg_floor(problem: Problem, k: int, lam: float) -> Run:
    """Take k - 1 products on one graph and go back, by hand."""

    def run() -> None:
        leaves, structure = tree_flatten(problem.equilibrium)
        inputs = [h.detach().requires_grad_() for h in leaves]
        outputs = tree_leaves(problem.func(tree_unflatten(inputs, structure)))
        v = g = problem.cotangents
        for _ in range(k - 1):
            images = torch.autograd.grad(outputs, inputs, g, retain_graph=True)
            g = [vi + torch.lerp(gi, ji, lam) for vi, gi, ji in zip(v, g, images, strict=True)]
        for tensor in problem.tensors:
            tensor.grad = None
        # Into the state as well, as a training step's `loss.backward()` does.
        torch.autograd.backward(outputs, [lam * gi for gi in g])

    return run


def solve_floor(problem: Problem, n: int) -> Run:
    """Evaluate f n times without autograd."""

    @torch.no_grad()
    def run() -> State:
        state = problem.start
        for _ in range(n):
            state = problem.func(state)
        return state

    return run
