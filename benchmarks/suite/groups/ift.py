"""Times the backward pass of implicit gradients that solve (I - J^T) g = v to a given tolerance.

The tolerance holds for ||v + J^T g - g|| / ||v|| in every sample, measured on the resulting g. Our
solvers take it as an argument. TorchDEQ's solvers stop by the change of their iterate instead. So
each of them gets the smallest `b_max_iter` that reaches the tolerance, which is its best case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from deq_phantom_plugin.adjoint import SOLVERS
from deq_phantom_plugin.adjoint.probe import with_probe

from .. import work
from ..accounting import Counted
from ..contest import Contender, Contest, Ratio, Settings, Unavailable
from ..peers import attached, seam
from ..timing import Run
from ..work import Problem

CAPS = {"synthetic": 200, "MDEQ": 80}  # the largest number of products
TOLERANCES = (1e-2, 1e-4)
PEERS = ("fixed_point_iter", "anderson", "broyden")


def contests(settings: Settings) -> Iterator[Contest]:
    """Yield one contest per problem and tolerance."""
    for problem in _problems(settings):
        adjoint = Adjoint(problem)
        for tol in TOLERANCES:
            yield _contest(problem, adjoint, tol)


def _problems(settings: Settings) -> Iterator[Problem]:
    linear = {"norm": 0.99, "activation": torch.clone}
    for width in (16,) if settings.quick else (512, 128, 2048):
        yield work.synthetic(width, 4 if settings.quick else 32, settings, **linear)
    yield work.mdeq("tiny", settings, "channels_last", regularised=True)


def _contest(problem: Problem, adjoint: Adjoint, tol: float) -> Contest:
    contenders, cap = [], adjoint.cap
    for solver in PEERS:
        for hook in (False, True):
            found: dict[str, float] = {}
            contenders.append(
                Contender(
                    f"{'hook_ift' if hook else 'ift'}, {solver}",
                    "torchdeq",
                    lambda s=solver, h=hook, n=found: adjoint.peer(s, h, tol, n),
                    found,
                )
            )
    for solver in sorted(SOLVERS):
        spec = f"ift(solver={solver!r}, tol={tol}, max_iter={cap})"
        found = {}
        contenders.append(
            Contender(spec, "ours", lambda s=spec, n=found: adjoint.ours(s, tol, n), found)
        )
    default, found = f"ift(tol={tol}, max_iter={cap})", {}
    contenders.append(
        Contender(default, "ours", lambda n=found: adjoint.ours(default, tol, n), found)
    )
    ours = [c.method for c in contenders if c.peer == "ours"]
    theirs = [c.method for c in contenders if c.peer == "torchdeq"]
    return Contest(
        "ift",
        f"{problem.name}, residual {tol:.0e} (forward residual {problem.residual:.1e})",
        contenders,
        [Ratio(default, theirs, 0.6), Ratio(ours, theirs)],
        problem.func,
        problem.known,
        repeats=7,
    )


class Adjoint:
    """The adjoint system of a problem; it checks how well a contender solves it.

    Args:
        problem: the problem.

    Attributes:
        cap: the largest number of products.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.cap = next(cap for kind, cap in CAPS.items() if problem.name.startswith(kind))
        leaves, self.structure = tree_flatten(problem.equilibrium)
        with torch.no_grad():
            after = tree_leaves(problem.func(problem.equilibrium))
        # TorchDEQ's `ift` linearises F at F(h*), and all others at h*.
        self._graphs = {False: self._graph(leaves), True: self._graph(after)}
        self._norm = _flat(problem.cotangents).norm(dim=1)

    def _graph(self, leaves: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        inputs = [h.detach().requires_grad_() for h in leaves]
        return inputs, tree_leaves(self.problem.func(tree_unflatten(inputs, self.structure)))

    def residual(self, g: list[Tensor], after: bool = False) -> Tensor:
        """Return ||v + J^T g - g|| / ||v|| of each sample, shape (B,).

        Args:
            g: one tensor per tensor of the state.
            after: whether J is that at F(h*), and not that at h*.
        """
        inputs, outputs = self._graphs[after]
        images = torch.autograd.grad(outputs, inputs, g, retain_graph=True)
        v = self.problem.cotangents
        error = _flat([vi + ji - gi for vi, ji, gi in zip(v, images, g, strict=True)])
        return error.norm(dim=1) / self._norm

    def ours(self, spec: str, tol: float, numbers: dict[str, float]) -> Run:
        """Return the backward pass of one of our strategies.

        Raises:
            Unavailable: if it does not reach the tolerance.
        """
        g = self._solution(lambda problem: attached(problem, spec))
        return self._accepted(g, attached(self.problem, spec), tol, False, numbers)

    def peer(self, solver: str, hook: bool, tol: float, numbers: dict[str, float]) -> Run:
        """Return the backward pass of TorchDEQ with the fewest iterations that reach `tol`.

        Raises:
            Unavailable: if it does not reach the tolerance.
        """

        def settings(n: int) -> dict[str, Any]:
            kind = {"hook_ift": True} if hook else {"ift": True}
            stop = {"b_max_iter": n, "b_tol": 0.0, "b_stop_mode": "rel"}
            return {**kind, **stop, "b_solver": solver}

        guess = self._evaluations(solver, tol, after=not hook)
        if guess is None:
            raise Unavailable(f"residual {tol:.0e} not reached within {self.cap} iterations")
        for n in range(max(1, guess - 3), min(self.cap, guess + 3) + 1):
            g = self._solution(lambda problem, n=n: seam(problem, **settings(n)))
            if float(self.residual(g, after=not hook).max()) <= tol:
                run = seam(self.problem, **settings(n))
                return self._accepted(g, run, tol, not hook, numbers)
        raise Unavailable(f"residual {tol:.0e} not reached near {guess} iterations")

    def _accepted(
        self, g: list[Tensor], run: Run, tol: float, after: bool, numbers: dict[str, float]
    ) -> Run:
        residual = float(self.residual(g, after).max())
        # A little slack, since our solvers compute the residual in another order.
        if not residual <= tol * 1.05:
            raise Unavailable(f"residual {residual:.1e} within {self.cap} products")
        numbers["residual, worst"] = residual
        return run

    def _solution(self, make: Callable[[Problem], Run]) -> list[Tensor]:
        """Return the g of a contender, which is the gradient of a zero that is added to F(h*)."""
        func, probes = with_probe(self.problem.func, self.problem.equilibrium)
        make(replace(self.problem, func=Counted(func), tensors=[*self.problem.tensors, *probes]))()
        return [probe.grad for probe in probes]

    def _evaluations(self, solver: str, tol: float, after: bool) -> int | None:
        """Return the number of products after which a solver of TorchDEQ reaches the tolerance.

        The best g of each sample so far counts, since the solver returns that. The result is None
        if the tolerance is not reached.
        """
        from torchdeq.solver import get_solver

        inputs, outputs = self._graphs[after]
        v = _flat(self.problem.cotangents)
        best = torch.full_like(self._norm, torch.inf)
        n = 0

        def func(y: Tensor) -> Tensor:
            nonlocal best, n
            parts = y.split([leaf[0].numel() for leaf in inputs], dim=1)
            g = [part.reshape_as(leaf) for part, leaf in zip(parts, inputs, strict=True)]
            image = _flat(torch.autograd.grad(outputs, inputs, g, retain_graph=True)) + v
            n += 1
            best = torch.minimum(best, (image - y).norm(dim=1) / self._norm)
            if bool((best <= tol).all()):
                raise _ReachedError
            return image

        try:
            get_solver(solver)(
                func, torch.zeros_like(v), max_iter=self.cap, tol=0.0, stop_mode="rel"
            )
        except _ReachedError:
            return n
        return None


class _ReachedError(Exception):
    """All samples have reached the tolerance, so the solve can stop."""


def _flat(leaves: Any) -> Tensor:
    return torch.cat([leaf.flatten(1) for leaf in leaves], dim=1)
