"""The Jacobian of F at an equilibrium: its regularisation and its spectral radius."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ._plumbing.compilation import as_written, never_compiled
from ._plumbing.lockstep import in_lockstep
from ._plumbing.once import warn_once
from ._plumbing.precision import full_precision
from ._plumbing.second_order import DoubleBackward
from ._plumbing.transforms import as_constants, refuse_in_torch_func
from ._plumbing.trial import Trial
from .adjoint import Linearization, Packing, mixes_samples
from .adjoint.spectrum import LeadingEigenvalue, leading_eigenvalue, random_start
from .contract.errors import ConvergenceWarning
from .contract.state import CheckedFunc, State, check_equilibrium, flatten, unflatten
from .contract.strategy import BatchDim, check_batch_dim
from .inspection import say_coupled
from .strategies.arguments import positive_float, positive_int

SPECTRAL_RADIUS_TOL = 1e-3


@never_compiled
def jacobian_reg(func: Callable[[State], State], equilibrium: State, n_samples: int = 1) -> Tensor:
    """Estimate ||J||_F^2 / numel, differentiable in what `func` captures.

    Hutchinson's estimator with Gaussian probes, E ||J^T e||^2 = ||J||_F^2 (Bai, Koltun & Kolter
    2021, "Stabilizing Equilibrium Models by Jacobian Regularization", eq. 4). Costs one evaluation
    of `func` and one vector-Jacobian product a probe. The equilibrium itself is held fixed. A
    `func` that was compiled runs as it was written, since compiled code is differentiated once, and
    `scaled_dot_product_attention` takes its MATH kernel, the one that has a second derivative.
    Where something else in `func` has none, the number is right and its backward is an error.

    Args:
        func: F, from a state to a state of the same structure.
        equilibrium: h*, detached; any state.
        n_samples: probes to average over.

    Returns:
        A scalar; `numel` counts all elements of the state, the batch included.

    Raises:
        ValueError: if `n_samples` is not a whole number of at least 1, or `func` or `equilibrium`
            break the contract (see `dpp.attach`).
        RuntimeError: inside a transform of `torch.func`.
    """
    n_samples = positive_int("n_samples", n_samples)
    refuse_in_torch_func("dpp.jacobian_reg")
    check_equilibrium(equilibrium)
    leaves, structure = flatten(equilibrium)
    leaves = as_constants(leaves)  # of forward mode, which follows a solve without autograd too
    differentiable = torch.is_grad_enabled()
    checked = CheckedFunc(as_written(func), equilibrium)
    with torch.enable_grad():
        inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        twice = DoubleBackward("dpp.jacobian_reg") if differentiable else None
        with twice or nullcontext():
            outputs, _ = flatten(checked(unflatten(inputs, structure)))
        outputs = [output for output in outputs if output.requires_grad]
        total = leaves[0].new_zeros((), dtype=Packing(leaves, None).dtype)
        grad: Callable[..., Sequence[Tensor]] = torch.autograd.grad if twice is None else twice.grad
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        for _ in range(n_samples if outputs else 0):
            probes = [torch.randn_like(output) for output in outputs]
            products = grad(outputs, inputs, probes, **options)
            total = total + sum(p.abs().square().sum(dtype=p.real.dtype) for p in products)
    reg = total / (n_samples * sum(leaf.numel() for leaf in leaves))
    return reg if differentiable else reg.detach()


def spectral_radius(
    func: Callable[[State], State],
    equilibrium: State,
    lam: float | Sequence[float] | None = None,
    *,
    batch_dim: BatchDim = "auto",
    tol: float = SPECTRAL_RADIUS_TOL,
    max_iter: int = 200,
) -> Tensor:
    """Estimate rho(J), or with `lam` the radius rho(lam J + (1 - lam) I) of the damped map.

    Convergence of a damped iteration depends on the latter (supplement, eq. A-11): an
    eigenvalue -1.4 of J is damped into the unit circle, 1.4 never.

    Power iteration that keeps its last 20 vectors (restarted Arnoldi), so that complex leading
    pairs of non-symmetric Jacobians are right; for each sample by itself. Costs one evaluation of
    `func` and at most `max_iter` vector-Jacobian products a factor.

    Args:
        func: F, from a state to a state of the same structure.
        equilibrium: h*, detached; any state.
        lam: the damping factor in (0, 1], or several, which share one graph and help one another;
            None for J itself.
        batch_dim: the dimension that counts samples, None where they are coupled, "auto" to find
            out whether those along dimension 0 are.
        tol: stops when the leading Ritz pair (theta, y) satisfies
            ||J^T y - theta y|| <= tol |theta| in every sample: for a normal J the relative error
            is then at most tol, otherwise theta is exact for a J changed by that much.
        max_iter: the most vector-Jacobian products a factor; stopping there warns once a run.

    Returns:
        The radius of each sample, shape (B,); a scalar where samples are coupled. With several
        factors, these stacked along a new first dimension.

    Raises:
        ValueError: on bad arguments, or a `func` or `equilibrium` that break the contract.
        NonFiniteError: if a product is NaN or infinite.
    """
    tol, max_iter = positive_float("tol", tol), positive_int("max_iter", max_iter)
    factors: list[Any] = list(lam) if isinstance(lam, Sequence) else [lam]
    valid = [f is None or (_is_number(f) and 0 < f <= 1) for f in factors]
    if not valid or not all(valid):
        raise ValueError(
            f"lam={lam!r}; expected a number in (0, 1], a sequence of such, or None for J"
        )
    check_batch_dim(batch_dim)
    check_equilibrium(equilibrium)
    with in_lockstep():
        with Trial(equilibrium):  # looking at an equilibrium does not change it
            checked = CheckedFunc(func, equilibrium)
            graph = Linearization(checked, equilibrium, "dpp.spectral_radius")
        packing, radii = _packing(graph, batch_dim), list[Tensor]()
        random = start = random_start(packing)
        for factor in factors:
            found = _leading(graph, packing, factor, start, tol, max_iter)
            radii.append(found.radius if packing.batch_dim is not None else found.radius.squeeze(0))
            # The last eigenvector alone would be an invariant space that hides a new leading one.
            start = found.vector + random / torch.linalg.vector_norm(random, dim=1, keepdim=True)
    return torch.stack(radii) if isinstance(lam, Sequence) else radii[0]


def _leading(
    graph: Linearization,
    packing: Packing,
    factor: float | None,
    start: Tensor,
    tol: float,
    max_vjp: int,
) -> LeadingEigenvalue:
    """Return the leading eigenvalue of the map damped by a factor; warns where it is not exact."""

    def apply(x: Tensor) -> Tensor:
        image = packing.pack(graph.vjp(packing.unpack(x)))
        return image if factor is None else torch.lerp(x, image, factor)

    with torch.no_grad(), full_precision(packing.device):
        found = leading_eigenvalue(apply, start, tol=tol, max_vjp=max_vjp, basis=20)
    if not (found.residual <= tol).all():
        warn_once(
            "spectral_radius",
            f"spectral_radius: after {found.n_vjp} vector-Jacobian products the leading Ritz "
            f"pair has residual {found.residual.max():.1e}, above tol={tol:.1e}; raise "
            "max_iter or tol",
            ConvergenceWarning,
        )
    return found


def _packing(graph: Linearization, batch_dim: BatchDim) -> Packing:
    """Return the packing whose rows are independent."""
    if batch_dim != "auto":
        return Packing(graph.inputs, batch_dim)
    packing = Packing(graph.inputs, 0)
    if not mixes_samples(graph, packing):
        return packing
    say_coupled()
    return Packing(graph.inputs, None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
