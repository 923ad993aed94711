"""Theorem 1 of "On Training Implicit Models": when a strategy's gradient is an ascent direction.

`ascent_condition` checks the condition of the theorem with dense matrices, for small problems.
`measured_inner_product` measures the inner product that the theorem is about, for any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..._plumbing.compilation import as_written
from ...adjoint import Linearization
from ...adjoint.probe import with_probe
from ...attach import attach
from ...contract.errors import NonFiniteError
from ...contract.state import CheckedFunc, State, check_equilibrium, flatten
from ...contract.strategy import BackwardStats, Context
from ...strategies import IFT
from ...strategies.arguments import positive_float
from ...strategies.registry import Spec
from .derivatives import as_vector, check_params, cosine, reached, vjp

_BYTE_LIMIT = 2**30  # for all dense matrices together
_STATE_LIMIT = 2**12  # elements of the state: each costs a backward pass of F and of the strategy
_MAX_VJP = 1000  # products for the reference of `measured_inner_product`


@dataclass(frozen=True)
class AscentCondition:
    """What Theorem 1 and its Remark 1 say about one gradient; see `ascent_condition` for symbols.

    Attributes:
        lhs: ||A (I - J^T) - dF/dtheta||_2.
        rhs: sigma_min^2 / sigma_max of dF/dtheta.
        holds: whether lhs < rhs by more than rounding can account for.
        remark_lhs: ||D (I - J^T) - I||_2.
        remark_rhs: 1 / kappa^2 = (sigma_min / sigma_max)^2.
        remark_holds: whether A = (dF/dtheta) D, and remark_lhs < remark_rhs by more than rounding.
        inner_product: <phantom gradient, exact gradient>, above zero for an ascent direction.
    """

    lhs: float
    rhs: float
    holds: bool
    remark_lhs: float
    remark_rhs: float
    remark_holds: bool
    inner_product: float

    def __str__(self) -> str:
        verdict = {True: "holds", False: "does not hold"}
        return (
            f"Theorem 1 {verdict[self.holds]}: ||A (I - J^T) - dF/dtheta|| = {self.lhs:.3g}, "
            f"sigma_min^2 / sigma_max = {self.rhs:.3g}\n"
            f"Remark 1 {verdict[self.remark_holds]}: ||D (I - J^T) - I|| = {self.remark_lhs:.3g}, "
            f"1 / kappa^2 = {self.remark_rhs:.3g}\n"
            f"<phantom, exact> = {self.inner_product:.6g}"
        )


@dataclass(frozen=True)
class MeasuredInnerProduct:
    """A strategy's gradient, compared with a reference that GMRES solved for.

    Attributes:
        inner_product: <phantom gradient, reference gradient>.
        cosine: the cosine of the angle between them; zero if one of them is zero.
        residual: ||v - (I - J^T) g|| / ||v|| of the reference, in the worst sample.
    """

    inner_product: float
    cosine: float
    residual: float

    def __str__(self) -> str:
        return (
            f"<phantom, reference> = {self.inner_product:.6g}, cosine {self.cosine:.6f}, "
            f"reference solved to a relative residual of {self.residual:.1e}"
        )


def ascent_condition(
    func: Callable[[State], State],
    equilibrium: State,
    params: Iterable[Tensor],
    grad: Spec,
    loss_grad: State,
    context: Context | None = None,
) -> AscentCondition:
    """Check the condition under which a strategy's gradient is an ascent direction.

    Source: Theorem 1 (eq. A-1) of the supplement of "On Training Implicit Models" (Geng et al.,
    NeurIPS 2021). J = dF/dh has the usual layout, shape (d_h, d_h). dF/dtheta and A have the shape
    (d_theta, d_h). Samples share parameters, so d_h counts all elements of the state, the batch
    included.

    1. v = dL/dh has shape (d_h,). The phantom gradient is A v. The exact gradient is
       (dF/dtheta) (I - J^T)^-1 v. Both have shape (d_theta,), and are taken at the h that is given.
    2. If ||A (I - J^T) - dF/dtheta|| < sigma_min^2 / sigma_max, then <A v, exact gradient> > 0.
    3. sigma_min is the d_h-th singular value of dF/dtheta. If d_theta < d_h it is zero, and the
       condition never holds.

    A is read off the strategy, one unit vector v at a time. For a strategy that is not linear in v,
    such as a Krylov solver, there are many such matrices. So a rank-one term is added to A, which
    makes A v the gradient measured for `loss_grad`. That suffices: the proof (A-4) uses A only in
    A v = (dF/dtheta + E) (I - J^T)^-1 v, where E is the difference in the condition.

    Remark 1 (A-5) asks for ||D (I - J^T) - I|| < 1 / kappa^2 where A = (dF/dtheta) D. D, of shape
    (d_h, d_h), is read off a probe that is added to F. The remark does not apply to other A, such
    as those of unrolled strategies away from the equilibrium, whose steps see other derivatives.

    The cost is d_h backward passes of F, d_h + 1 of the strategy, and dense algebra in float64.

    Args:
        func: F, from a state to a state of the same structure.
        equilibrium: h*, detached; it need not be exact.
        params: tensors that require grad and that `func` captures; d_theta elements together.
        grad: the strategy's spec, see `dpp.get_strategy`.
        loss_grad: v, with the structure and the shapes of the equilibrium.
        context: as for `dpp.attach`. Its monitor is not called, and its memory is not changed.

    Raises:
        ValueError: if an argument breaks the contract, I - J^T is singular, or the problem is too
            large for dense matrices; `measured_inner_product` has no such limit.
        NonFiniteError: if a derivative of `func` or of the strategy is NaN or infinite.
    """
    func = as_written(func)
    graph, thetas, cotangents = _problem(func, equilibrium, params, loss_grad)
    _check_size(sum(v.numel() for v in cotangents), sum(theta.numel() for theta in thetas))
    probed, probes = with_probe(func, equilibrium)
    attached = _attach(probed, equilibrium, grad, context)

    exact = _dense(graph.outputs, [*thetas, *graph.inputs], "func")
    phantom = _dense(attached, [*thetas, *probes], "the strategy")
    measured = as_vector(vjp(attached, [*thetas, *probes], cotangents))
    _check_finite("the strategy", measured)
    v = as_vector(cotangents)
    phantom += torch.outer(measured - phantom @ v, v / (v @ v))
    eps = max(torch.finfo(tensor.dtype).eps for tensor in [*thetas, *cotangents])
    return _conditions(exact, phantom, measured, v, eps)


def measured_inner_product(
    func: Callable[[State], State],
    equilibrium: State,
    params: Iterable[Tensor],
    grad: Spec,
    loss_grad: State,
    context: Context | None = None,
    tol: float = 1e-8,
) -> MeasuredInnerProduct:
    """Measure the inner product that Theorem 1 is about, for one v and a state of any size.

    The reference is the implicit gradient. GMRES solves for it with at most 1000 vector-Jacobian
    products, and without a dense matrix.

    Args:
        func: F, from a state to a state of the same structure.
        equilibrium: h*, detached; the reference is (dF/dtheta) (I - J^T)^-1 v there.
        params: tensors that require grad and that `func` captures.
        grad: the strategy's spec, see `dpp.get_strategy`.
        loss_grad: v, with the structure and the shapes of the equilibrium.
        context: as for `dpp.attach`. Its monitor is not called, and its memory is not changed.
        tol: the relative residual that the reference is to reach in every sample; ten roundings of
            the state's dtype if that is more.

    Warns:
        ConvergenceWarning: if the reference stops short of `tol`.

    Raises:
        ValueError: if an argument breaks the contract.
        NonFiniteError: if a gradient is NaN or infinite.
    """
    tol, func = positive_float("tol", tol), as_written(func)
    _, thetas, cotangents = _problem(func, equilibrium, params, loss_grad)
    tol = max(tol, *(10 * torch.finfo(v.dtype).eps for v in cotangents))
    residuals: list[float] = []

    def keep_residual(stats: BackwardStats) -> None:
        if stats.residual is not None:
            residuals.append(float(stats.residual.max()))

    reference = IFT(solver="gmres", tol=tol, max_iter=_MAX_VJP)
    found = as_vector(vjp(_attach(func, equilibrium, grad, context), thetas, cotangents))
    attached = _attach(func, equilibrium, reference, context, keep_residual)
    wanted = as_vector(vjp(attached, thetas, cotangents))
    _check_finite("the strategy", found)
    inner = float(found @ wanted)
    return MeasuredInnerProduct(inner, cosine(found, wanted, of_zero=0.0), residuals[-1])


def _conditions(
    exact: Tensor, phantom: Tensor, measured: Tensor, v: Tensor, eps: float
) -> AscentCondition:
    """Compare the derivatives of F with what was read off the strategy.

    Args:
        exact: dF/dtheta on top of J^T, shape (d_theta + d_h, d_h).
        phantom: A on top of D, of the same shape.
        measured: `phantom` times v, shape (d_theta + d_h,).
        v: dL/dh, shape (d_h,).
        eps: the rounding of the dtype of the measurement.

    Raises:
        ValueError: if I - J^T is singular.
    """
    d_h, d_theta = len(v), len(measured) - len(v)
    to_params, transposed = exact[:d_theta], exact[d_theta:]
    a, d = phantom[:d_theta], phantom[d_theta:]
    identity = torch.eye(d_h, dtype=v.dtype, device=v.device)
    system = identity - transposed

    stretches = torch.linalg.svdvals(system)
    if not stretches[-1] > eps * stretches[0]:
        raise ValueError(
            "I - J^T is singular to the dtype's precision: 1 is an eigenvalue of the Jacobian of "
            "F, so there is no exact gradient at this equilibrium to compare with"
        )
    singular = torch.linalg.svdvals(to_params)
    largest = float(singular[0])
    smallest = float(singular[d_h - 1]) if d_theta >= d_h else 0.0
    inverse_kappa = smallest / largest if largest > 0 else 0.0
    lhs = float(torch.linalg.matrix_norm(a @ system - to_params, 2))
    remark_lhs = float(torch.linalg.matrix_norm(d @ system - identity, 2))

    # How far rounding of all entries can move the left-hand sides, in the measurement's dtype.
    rounding, stretch = 10 * eps, float(stretches[0])
    norm_u, norm_a, norm_d = (float(torch.linalg.matrix_norm(m)) for m in (to_params, a, d))
    is_product = float(torch.linalg.matrix_norm(a - to_params @ d)) <= rounding * largest * norm_d
    slack = rounding * (norm_a * stretch + norm_u)
    # The factor 2 is for the rounding of D itself, and for that of A = (dF/dtheta) D.
    remark_slack = 2 * rounding * (norm_d * stretch + math.sqrt(d_h))
    return AscentCondition(
        lhs=lhs,
        rhs=smallest * inverse_kappa,
        holds=lhs + slack < smallest * inverse_kappa,
        remark_lhs=remark_lhs,
        remark_rhs=inverse_kappa**2,
        remark_holds=is_product and remark_lhs + remark_slack < inverse_kappa**2,
        # The solve is backward stable: its error acts like one of I - J^T, which the slack covers.
        inner_product=float(measured[:d_theta] @ (to_params @ torch.linalg.solve(system, v))),
    )


def _problem(
    func: Callable[[State], State], equilibrium: State, params: Iterable[Tensor], loss_grad: State
) -> tuple[Linearization, list[Tensor], list[Tensor]]:
    """Check the arguments; return F's graph, the parameters and the leaves of v.

    The leaves of v get the dtypes of the equilibrium.

    Raises:
        ValueError: if an argument breaks the contract.
    """
    check_equilibrium(equilibrium)
    leaves, structure = flatten(equilibrium)
    thetas = check_params(params)
    cotangents, given = flatten(loss_grad)
    if given != structure:
        raise ValueError(f"loss_grad has the structure {given}; expected {structure}")
    for v, leaf in zip(cotangents, leaves, strict=True):
        if not isinstance(v, Tensor) or v.shape != leaf.shape:
            got = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
            raise ValueError(f"loss_grad has a leaf {got}; expected the shape {tuple(leaf.shape)}")
    if any(tensor.is_complex() for tensor in [*leaves, *thetas, *cotangents]):
        raise ValueError("a complex tensor in equilibrium, params or loss_grad; expected real ones")
    cotangents = [v.detach().to(leaf) for v, leaf in zip(cotangents, leaves, strict=True)]
    length = torch.linalg.vector_norm(as_vector(cotangents))
    if not 0 < length < math.inf:
        raise ValueError(f"loss_grad has norm {length:g}; expected finite numbers, not all zero")

    graph = Linearization(CheckedFunc(func, equilibrium), equilibrium)
    used = reached(graph.outputs, thetas)
    if not all(used):
        raise ValueError(
            f"params[{used.index(False)}] is not used by func; expected tensors that func captures"
        )
    return graph, thetas, cotangents


def _check_size(d_h: int, d_theta: int) -> None:
    # Two matrices in float64, of F and of the strategy, and twice as much memory to work on them.
    needed = 6 * 8 * d_h * (d_theta + d_h)
    if needed > _BYTE_LIMIT or d_h > _STATE_LIMIT:
        raise ValueError(
            f"a state of {d_h} elements and parameters of {d_theta} need {needed / 2**30:.3g} GiB "
            f"for dense matrices and {2 * d_h + 1} backward passes; ascent_condition accepts at "
            f"most {_BYTE_LIMIT / 2**30:.3g} GiB and {_STATE_LIMIT} elements of state. Use "
            "measured_inner_product, which takes the same arguments and needs no dense matrix"
        )


def _attach(
    func: Callable[[State], State],
    equilibrium: State,
    grad: Spec,
    context: Context | None,
    monitor: Callable[[BackwardStats], None] | None = None,
) -> list[Tensor]:
    """Return the leaves of the attached state. The context's memory and monitor are left alone."""
    context = Context() if context is None else context
    context = replace(
        context,
        step=context.current_step,
        total=context.current_total,
        place=context.current_place,
        memory=None,
        monitor=monitor,
    )
    with torch.enable_grad():
        return flatten(attach(func, equilibrium, grad, context))[0]


def _dense(outputs: Sequence[Tensor], inputs: Sequence[Tensor], of: str) -> Tensor:
    """Return the derivatives of all outputs, shape (elements of inputs, elements of outputs)."""
    units = [torch.zeros(o.shape, dtype=o.dtype, device=o.device) for o in outputs]
    rows = []
    for unit in units:
        elements = unit.view(-1)
        for i in range(len(elements)):
            elements[i] = 1
            rows.append(as_vector(vjp(outputs, inputs, units)))
            elements[i] = 0
    matrix = torch.stack(rows)
    _check_finite(of, matrix)
    return matrix.mT


def _check_finite(of: str, tensor: Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise NonFiniteError(
            f"a derivative of {of} at the equilibrium is NaN or infinite; expected finite numbers"
        )
