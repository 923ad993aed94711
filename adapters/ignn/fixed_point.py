"""`FixedPoint`, the module of an implicit graph layer that solves and attaches its equilibrium.

It iterates h <- F(h) without a graph until the state stops changing, and then lets the strategy
attach its gradient.

The nodes are one system, so a strategy measures its error over all of them together. Their states
may differ by many orders of magnitude, as far from where the features are. A network that divides
each state by its length then sends a gradient of 1 / ||h_i|| to node i, and the largest of these
would drown all others in the error. So the strategy gets the state in units of each node's length:

    h_i = s_i u_i,    u = F(s u) / s,    s_i = ||h_i||, rounded to a power of two.

This is the same equilibrium with the same gradient. The rounding keeps every number of the state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.calls import Calls, Counted
from deq_phantom_plugin._plumbing.compilation import check_compile, compiled
from deq_phantom_plugin._plumbing.once import warn
from deq_phantom_plugin.hosts.attaching import Attaching
from deq_phantom_plugin.hosts.evaluation import attaches, watched
from deq_phantom_plugin.hosts.settings import fitting

_CHECK_EVERY = 4
_SMALLEST = 1e-12  # the length below which `F.normalize` does not tell states apart


class FixedPoint(Attaching):
    """Solves h = F(h) by iteration, and attaches the gradient of a strategy.

    Args:
        grad: the spec of the strategy, see `dpp.get_strategy`.
        f_max_iter: the largest number of iterations.
        f_tol: the solve stops once no number of the state changes by more than this. The change is
            relative to the largest number of the state if that is above 1, since rounding in
            float32 grows with it.
        grad_in_eval: whether the gradient is attached in evaluation mode too.
        compile: whether F is compiled for the solve, and for strategies that go through its graph
            once; or a mode of `torch.compile`.

    Attributes:
        grad: the strategy; `dpp.set_grad` replaces it.
        memory: what the strategy keeps between steps.
        node_tol: if the network sets it, the solve also goes on until the state of no node changes
            by more than this, relative to its length. None where small states do not matter.

    Raises:
        ValueError: if an argument is out of range.
    """

    host = "ignn"
    compiles: bool | str = False  # older pickles do not have these attributes
    node_tol: float | None = None

    def __init__(
        self,
        grad: Any,
        f_max_iter: int,
        f_tol: float,
        grad_in_eval: bool = False,
        compile: bool | str = False,
    ) -> None:
        # Nodes depend on one another, so the whole state is one sample.
        super().__init__(grad, batch_dim=None, grad_in_eval=grad_in_eval)
        if isinstance(f_max_iter, bool) or not isinstance(f_max_iter, int) or f_max_iter < 1:
            raise ValueError(f"f_max_iter={f_max_iter!r}; expected a whole number of at least 1")
        if not f_tol >= 0:
            raise ValueError(f"f_tol={f_tol!r}; expected a number of at least 0")
        self.f_max_iter, self.f_tol = f_max_iter, f_tol
        self.compiles = check_compile(compile)  # `compile` is a method of modules
        self._calls = Calls()

    def strategy_of(self, spec: Any) -> dpp.GradStrategy:
        """Return the strategy of a spec. The solve makes no estimate for `shine` to use."""
        return fitting(super().strategy_of(spec), "the fixed-point solve of IGNN")

    @property
    def nfe(self) -> int:
        """The number of evaluations of F in the last solve."""
        return int(self._calls.of_solve())

    def forward(
        self, func: Callable[[Tensor], Tensor], start: Tensor, explained: bool = False
    ) -> Tensor:
        """Return the equilibrium, with its gradient attached in training mode.

        Args:
            func: F, from a state to a state of the same shape.
            start: the state at which the solve begins.
            explained: whether the gradient is attached in evaluation mode too, since explainers
                differentiate there.

        Raises:
            NonFiniteError: if the solve makes NaN or infinite numbers.
        """
        func = compiled(func, self.compiles, self, dynamic=None)
        attaching = attaches(self) or (explained and torch.is_grad_enabled())
        counted = Counted(func)
        self._calls = counted.calls
        if not attaching:
            return self._solve(watched(self, counted), start)
        context = self.context(start)
        if self.grad.resolve(context).owns_solve:
            out: Tensor = self.attached(counted, start, context, 0)
            return out
        found = self._solve(counted, start)
        size = _sizes(found)
        context = self.context(start / size)
        attached: Tensor = self.attached(_InUnits(func, size), found / size, context, self.nfe)
        return attached * size

    @torch.no_grad()
    def _solve(self, func: Callable[[Tensor], Tensor], state: Tensor) -> Tensor:
        if state.numel() == 0:
            return state
        for step in range(1, self.f_max_iter + 1):
            state, last = func(state), state
            # Reading the number waits for the device, so this is not done in every iteration.
            if step % _CHECK_EVERY == 0 or step == self.f_max_iter:
                change, of_node = self._changes(state, last)
                if change <= self.f_tol and of_node <= (self.node_tol or 0):
                    return state
                if not math.isfinite(change):
                    raise dpp.NonFiniteError(
                        f"the forward solve made NaN or infinite states in {step} iterations. Look "
                        "for such numbers in the parameters, or for an activation steeper than 1"
                    )
        what = f"{change:.1e}, above f_tol={self.f_tol}"
        if change <= self.f_tol:
            what = f"{of_node:.1e} of a node's length, above {self.node_tol}"
        warn(
            f"the forward solve stopped at f_max_iter={self.f_max_iter} with a change of {what}: "
            "the state is not yet an equilibrium. Raise f_max_iter or f_tol, or lower kappa",
            dpp.ConvergenceWarning,
        )
        return state

    def _changes(self, state: Tensor, last: Tensor) -> tuple[float, float]:
        """Return the largest change of a number, and of a node relative to its length."""
        change = (state - last).abs()
        largest = change.amax() / state.abs().amax().clamp_min(1)
        if self.node_tol is None:
            return float(largest), 0.0
        length = state.abs().amax(dim=-1).clamp_min(_SMALLEST)
        found = torch.stack([largest, (change.amax(dim=-1) / length).amax()]).tolist()
        return found[0], found[1]


def _sizes(state: Tensor) -> Tensor:
    """Return the length of each node's state as a power of two, shape (num_nodes, 1)."""
    length = torch.linalg.vector_norm(state, dim=-1, keepdim=True).clamp_min(_SMALLEST)
    size: Tensor = length / torch.frexp(length).mantissa  # exact: the quotient is a power of two
    return size


class _InUnits:
    """F in the units of each node: u -> F(size u) / size."""

    def __init__(self, func: Callable[[Tensor], Tensor], size: Tensor) -> None:
        self.func = self.__wrapped__ = func
        self.size = size

    def __call__(self, state: Tensor) -> Tensor:
        return self.func(state * self.size) / self.size
