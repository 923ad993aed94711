"""One equilibrium and one loss, on which all strategies of a report are measured.

A `Problem` answers what a report asks of it: the gradient of a strategy, residuals, spectral radii,
and whether F mixes samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_map_only

from ..._plumbing.compilation import as_written
from ..._plumbing.inference import refuse_in_inference_mode
from ...adjoint import Linearization, Packing, relative_norm
from ...adjoint.probe import CountedPasses, with_probe
from ...attach import attach
from ...contract.state import CheckedFunc, State, check_equilibrium, flatten, ordinary, unflatten
from ...contract.strategy import BackwardStats, Context, GradStrategy
from ...inspection import Findings, inspect_map
from ...jacobian import spectral_radius
from .derivatives import as_vector, check_params, reached, short_of_compiled, vjp

_RADIUS_TOL = 1e-2


@dataclass(frozen=True, eq=False)
class Problem:
    """What all strategies are measured on.

    An F that was compiled is measured as it was written, since compiled code can be differentiated
    once only.

    Attributes:
        func: F, from a state to a state.
        equilibrium: h*, detached. Leaves that were made in inference mode are copied.
        loss: a function from a state to a scalar.
        params: the tensors to differentiate with respect to, which F captures or is built from.
        context: the context for the strategies.
        edges: places in the graph before F, which are differentiated with respect to, too.
    """

    func: Callable[[State], State]
    equilibrium: State
    loss: Callable[[State], Tensor]
    params: Sequence[Tensor]
    context: Context = field(default_factory=Context)
    edges: Sequence[GradientEdge] = ()

    def __post_init__(self) -> None:
        refuse_in_inference_mode("a measurement of gradients")
        check_equilibrium(self.equilibrium)
        leaves, structure = flatten(self.equilibrium)
        state = unflatten([ordinary(leaf) for leaf in leaves], structure)
        object.__setattr__(self, "equilibrium", state)
        if not self.edges:
            object.__setattr__(self, "params", check_params(self.params))

    @property
    def device(self) -> torch.device:
        """The device of the state."""
        leaves: list[Tensor] = flatten(self.equilibrium)[0]
        return leaves[0].device

    @property
    def packing(self) -> Packing:
        """The packing of the state, by what the context says about samples."""
        return Packing(flatten(self.equilibrium)[0], self.context.sample_dim)

    def cotangent(self, state: State) -> list[Tensor]:
        """Return v = dL/dh at a state, one tensor per leaf.

        Raises:
            ValueError: if the loss is not a scalar that depends on the state.
        """
        leaves, structure = flatten(state)
        with torch.enable_grad():
            inputs = [leaf.detach().requires_grad_() for leaf in leaves]
            loss = check_scalar(self.loss(unflatten(inputs, structure)))
            if not loss.requires_grad:
                raise ValueError(
                    "the loss does not depend on the state, so it has no gradient; compute it from "
                    "the state that it is given, not from one captured before"
                )
            return list(
                torch.autograd.grad(
                    loss, inputs, retain_graph=True, allow_unused=True, materialize_grads=True
                )
            )

    def attach(self, strategy: GradStrategy, func: Callable[[State], State] | None = None) -> State:
        """Return the equilibrium attached by a strategy, to `func` or else to F."""
        with torch.enable_grad():
            return attach(
                self._written if func is None else func, self.equilibrium, strategy, self.context
            )

    def differentiate(self, strategy: GradStrategy) -> Gradient:
        """Return the gradient that a strategy gives, and count its evaluations and products."""
        counted = _Counted(self._written, self.context.monitor)
        probed, probes = with_probe(counted, self.equilibrium)
        told = replace(self, context=replace(self.context, monitor=counted.note))
        attached = told.attach(strategy, probed)
        v = self.cotangent(attached)
        grads = vjp(flatten(attached)[0], [*self.params, *self.edges, *probes], v)
        split = len(self.params) + len(self.edges)
        return Gradient(
            as_vector(grads[:split]),
            self._adjoint_residual(v, grads[split:]),
            counted.n_evaluations,
            counted.n_vjp,
            counted.n_clipped,
        )

    @property
    def _written(self) -> Callable[[State], State]:
        """F, not compiled."""
        return as_written(self.func)

    def second_derivative(self, strategy: GradStrategy) -> Tensor | None:
        """Return the gradient of <dL/dtheta, w> for a fixed random w, as one vector of float64.

        Return None if the strategy or the loss has no second derivative.
        """
        generator = torch.Generator("cpu").manual_seed(0)
        with torch.enable_grad():
            loss = self.loss(self.attach(strategy))
            try:
                first = torch.autograd.grad(
                    loss, self.params, create_graph=True, allow_unused=True, materialize_grads=True
                )
                total = loss.new_zeros(())
                for grad in first:
                    w = torch.randn(grad.shape, generator=generator, dtype=torch.float64)
                    total = total + (grad * w.to(grad)).real.sum()
                second = torch.autograd.grad(
                    total, self.params, allow_unused=True, materialize_grads=True
                )
            except RuntimeError:  # autograd raises it where a graph has no second derivative
                return None
        return as_vector(second)

    def linearize(self) -> Linearization:
        """Return F linearised at the equilibrium, for products with J^T."""
        return Linearization(CheckedFunc(self.func, self.equilibrium), self.equilibrium)

    def reached(self) -> list[Tensor]:
        """Return the parameters that F depends on.

        Raises:
            ValueError: if there are none.
        """
        found = reached(self.linearize().outputs, self.params)
        if any(found):
            return [param for param, used in zip(self.params, found, strict=True) if used]
        raise ValueError(
            f"func depends on none of the {len(self.params)} tensors in params, so there is no "
            "gradient to measure; pass the tensors that func uses, themselves and not copies"
        )

    def short_of_compiled(self) -> Problem:
        """Return the same problem with gradients that end at compiled code before F.

        Compiled code can be differentiated once only, and training does that. If there is such
        code, gradients with respect to the initial state of an iteration are left out as well. If
        there is none, the problem itself is returned.
        """
        start = self.context.initial_state
        before = [x for x in flatten(start)[0] if isinstance(x, Tensor)]
        params, edges = short_of_compiled(self.linearize().outputs, self.params)
        if not edges and not short_of_compiled(before, self.params)[1]:
            return self
        context = replace(self.context, initial_state=tree_map_only(Tensor, Tensor.detach, start))
        return replace(self, params=params, edges=edges, context=context)

    def forward_residual(self) -> float:
        """Return ||F(h) - h|| / ||F(h)|| of the equilibrium, the whole batch together."""
        with torch.no_grad():
            image = flatten(CheckedFunc(self._written, self.equilibrium)(self.equilibrium))[0]
        state = flatten(self.equilibrium)[0]
        return _residual([f - h for f, h in zip(image, state, strict=True)], image)

    def radii(self, lams: Sequence[float], max_iter: int) -> dict[float, float]:
        """Return rho(lam J + (1 - lam) I) for each lam, the largest of the batch.

        Args:
            lams: the damping factors.
            max_iter: the largest number of products per factor.
        """
        found = spectral_radius(
            self.func,
            self.equilibrium,
            lams,
            batch_dim=self.context.batch_dim,
            tol=_RADIUS_TOL,
            max_iter=max_iter,
        )
        largest = [float(radius.max()) if radius.numel() else 0.0 for radius in found]
        return dict(zip(lams, largest, strict=True))

    def inspect(self) -> Findings:
        """Find out whether F mixes samples, and whether it is the same map each time."""
        func = CheckedFunc(self.func, self.equilibrium)
        told = self.context.batch_dim
        return inspect_map(func, self.equilibrium, 0 if isinstance(told, str) else told)

    def settled(self, coupled: bool | None) -> tuple[Problem, Problem]:
        """Return the problem twice: as strategies see it, and as it really is.

        The two differ where F mixes samples that the context says are independent.

        Args:
            coupled: whether F mixes samples, as `inspect` found out.
        """
        whole = replace(self, context=replace(self.context, batch_dim=None))
        if self.context.batch_dim != "auto":
            return self, whole if coupled else self
        told = whole if coupled else replace(self, context=replace(self.context, batch_dim=0))
        return told, told

    def _adjoint_residual(self, v: Sequence[Tensor], g: Sequence[Tensor]) -> float:
        """Return ||v - (I - J^T) g|| / ||v||, all leaves and samples together."""
        image = self.linearize().vjp(g)
        return _residual([vi - gi + ji for vi, gi, ji in zip(v, g, image, strict=True)], v)


@dataclass(frozen=True, eq=False)
class Gradient:
    """The gradient of a strategy, and what it took.

    Attributes:
        vector: dL/dtheta, all parameters in one vector of float64, a complex number as a pair.
        residual: ||v - (I - J^T) g|| / ||v|| at h* of the g behind it, the whole batch together.
        n_evaluations: the number of calls of F.
        n_vjp: the number of backward passes through F, with the one to the parameters.
        n_clipped: see `BackwardStats`.
    """

    vector: Tensor
    residual: float
    n_evaluations: int
    n_vjp: int
    n_clipped: int

    @property
    def norm(self) -> float:
        """||dL/dtheta||."""
        return float(torch.linalg.vector_norm(self.vector))


def check_scalar(loss: Any) -> Tensor:
    """Return what a loss function returned, if it is a scalar.

    Raises:
        ValueError: if it is not a tensor with one element.
    """
    if not isinstance(loss, Tensor):
        raise ValueError(f"loss returned a {type(loss).__name__}; expected a scalar tensor")
    if loss.numel() != 1:
        raise ValueError(
            f"loss returned a tensor of shape {tuple(loss.shape)}; expected a scalar, such as "
            "its mean"
        )
    return loss


def inner_product(v: Sequence[Tensor], state: State) -> Tensor:
    """Return Re <v, h>, a loss whose gradient dL/dh is v at any state h."""
    total = [(vi.conj() * h).real.sum() for vi, h in zip(v, flatten(state)[0], strict=True)]
    return torch.stack(total).sum()


class _Counted(CountedPasses):
    """F, whose evaluations, products and clipped products are counted.

    Args:
        func: F.
        monitor: gets the `BackwardStats`, too.
    """

    def __init__(
        self,
        func: Callable[[State], State],
        monitor: Callable[[BackwardStats], None] | None,
    ) -> None:
        super().__init__(func)
        self._monitor = monitor
        self.n_clipped = 0

    def note(self, stats: BackwardStats) -> None:
        """Count the clipped products of a backward pass."""
        self.n_clipped += stats.n_clipped
        if self._monitor is not None:
            self._monitor(stats)


def _residual(error: Sequence[Tensor], of: Sequence[Tensor]) -> float:
    """Return ||error|| / ||of||, all leaves together."""
    return float(relative_norm(as_vector(error)[None], as_vector(of)[None]))
