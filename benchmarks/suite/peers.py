"""How each library does the work, and the floors.

A floor is a loop written by hand, with nothing around it: the least that such code can cost.
"""

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
        Unavailable: if there is no strategy of this name, or if it does not take these arguments.
    """
    try:
        return dpp.get_strategy(spec)
    except ValueError as error:
        raise Unavailable(str(error).partition("\n")[0]) from None


def attached(problem: Problem, spec: str, context: dpp.Context | None = None) -> Run:
    """Return code that attaches one of our strategies at the equilibrium, and differentiates.

    Without a context there is a memory, as in every host and adapter. So what is found out about F
    is found out in the first run, and seldom again.
    """
    named = strategy(spec)
    context = context or dpp.Context(memory=dpp.Memory())
    return lambda: problem.backward(dpp.attach(problem.func, problem.equilibrium, named, context))


# --- TorchDEQ ---------------------------------------------------------------------------------


def torchdeq(**settings: Any) -> Any:
    """Return TorchDEQ's module with our hook. An integer `grad`, or `ift=True`, runs its own code.

    Args:
        **settings: the settings of `get_deq`.

    Raises:
        Unavailable: if TorchDEQ is not installed, or if it has no solver of this name.
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
    """Return code that attaches in TorchDEQ's module, and differentiates.

    The forward solver of the module returns its start, so only the gradient is measured.

    Args:
        problem: the work.
        no_stat: TorchDEQ's setting of this name, with which a list of tensors stays a list.
        **settings: the settings of `get_deq`. `grad` may be an integer, which is TorchDEQ's own
            gradient, or a spec of ours.
    """
    deq = torchdeq(no_stat=no_stat, **settings)
    deq.f_solver = _where_it_starts

    def run() -> None:
        states, _ = deq(problem.spread, problem.equilibrium)
        problem.backward(states[-1])

    return run


def _where_it_starts(func: Callable, x0: Any, **settings: Any) -> tuple[Any, list[Any], Any]:
    """Be a forward solver that returns its start."""
    from torchdeq.solver.stat import SolverStat

    return x0, [x0], SolverStat()


def evaluations(solver: str, n: int) -> int:
    """Return the `max_iter` with which a solver in TorchDEQ's table evaluates f `n` times."""
    return n - 1 if solver.startswith("broyden") else n


# --- silva-networks ---------------------------------------------------------------------------


class Silva(nn.Module):
    """The engine of silva-networks, with the interface of TorchDEQ's module.

    Args:
        parameters: the tensors, besides the state, that get gradients.
        **settings: the settings of `SolverConfig`.

    Raises:
        Unavailable: if silva-networks is not installed.
    """

    def __init__(self, parameters: Iterable[Tensor], **settings: Any) -> None:
        super().__init__()
        if why := why_not("silva_networks"):
            raise Unavailable(f"{why}: make bench-silva")
        from silva_networks.deq_engine import SILVADEQEngine
        from silva_networks.solvers import SolverConfig

        # A tolerance must be positive. This one is never reached, so there are as many iterations
        # as for the others. The engine computes residuals for its stopping test in any case, so
        # they cannot be left out.
        config = SolverConfig(tol=1e-30, backward_tol=1e-30, **settings)
        self._engine = [SILVADEQEngine(config)]  # in a list, so that it is not a submodule
        self._tensors = tuple(parameters)

    def forward(
        self, func: Callable[..., Any], start: State, solver_kwargs: None = None
    ) -> tuple[list[State], Any]:
        """Solve, attach the gradient, and return the states and a dict as TorchDEQ does."""
        single = isinstance(start, Tensor)
        state = self._engine[0](
            func if single else lambda leaves: list(func(*leaves)), start, tensors=self._tensors
        )
        return [state], {"rel_lowest": torch.zeros(1)}


# --- foreign checkouts ------------------------------------------------------------------------


def checkout(repository: str, folder: str) -> Path:
    """Return a folder of a checkout in `.hosts`, or in the folder that DEQ_PHANTOM_HOSTS names.

    Args:
        repository: the repository as owner/name.
        folder: a path in the checkout.

    Raises:
        Unavailable: if there is no such checkout.
    """
    hosts = Path(os.environ.get("DEQ_PHANTOM_HOSTS", Path(__file__).parents[2] / ".hosts"))
    found = hosts / repository.partition("/")[2] / folder
    if not found.is_dir():
        raise Unavailable(f"no checkout of {repository} in .hosts or DEQ_PHANTOM_HOSTS")
    return found


class PhantomGrad(nn.Module):
    """The layer of Gsunshine/phantom_grad, with the interface of TorchDEQ's module.

    The repository is the code of "On Training Implicit Models".

    Args:
        k: the layer's `pg_steps`.
        lam: the layer's `tau`.
        updates: the number of updates of its Broyden solve; None for a solve that returns its
            start.

    Raises:
        Unavailable: if there is no checkout of the repository.
    """

    def __init__(self, k: int, lam: float, updates: int | None) -> None:
        super().__init__()
        lib = checkout("Gsunshine/phantom_grad", "MDEQ/MDEQ_CIFAR/lib")
        if str(lib) not in sys.path:
            sys.path.append(str(lib))
        # The file is loaded alone, since its package would also import the models.
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
        self._layer = [layer.MDEQWrapper(None, lam, k)]  # in a list, so it is not a submodule
        self._updates = updates

    def forward(
        self, func: Callable[..., Any], start: State, solver_kwargs: None = None
    ) -> tuple[list[State], Any]:
        """Solve, attach the gradient, and return the states and a dict as TorchDEQ does."""
        if isinstance(start, Tensor):
            raise Unavailable("a list of images only")
        layer = self._layer[0].train(self.training)
        layer.func = lambda leaves, *rest: list(func(*leaves))
        state = layer(start, start[0], threshold=self._updates)  # f has its own injection
        return [state], {"rel_lowest": torch.zeros(1)}


# --- floors -----------------------------------------------------------------------------------


def upg_floor(problem: Problem, k: int, lam: float) -> Run:
    """Return code that takes k damped steps and differentiates them, written by hand."""

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
    """Return code that computes k terms of the damped Neumann series, written by hand.

    It takes k - 1 products on one graph, and one backward pass.
    """

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
        # This also computes the gradient of the state, as `loss.backward()` does in training.
        torch.autograd.backward(outputs, [lam * gi for gi in g])

    return run


def solve_floor(problem: Problem, n: int) -> Run:
    """Return code that evaluates f n times without autograd, written by hand."""

    @torch.no_grad()
    def run() -> State:
        state = problem.start
        for _ in range(n):
            state = problem.func(state)
        return state

    return run
