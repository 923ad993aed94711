"""Two estimates of the Jacobian J = dF/dh at an equilibrium.

`jacobian_reg` estimates its Frobenius norm, as a term of a loss. `spectral_radius` estimates the
size of its largest eigenvalue. Both take vector-Jacobian products; J itself is never formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ._plumbing.buffers import Buffers
from ._plumbing.compilation import as_written, never_compiled
from ._plumbing.inference import refuse_in_inference_mode
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

    Source: Bai, Koltun & Kolter 2021, "Stabilizing Equilibrium Models by Jacobian Regularization",
    eq. 4. It is Hutchinson's estimator with Gaussian probes e: E ||J^T e||^2 = ||J||_F^2. It costs
    one evaluation of `func`, and one vector-Jacobian product per probe. The equilibrium is held
    fixed.

    A `func` that was compiled runs as it was written, since compiled code can be differentiated
    once only. `scaled_dot_product_attention` takes its MATH kernel, the one that has a second
    derivative. Where another operation in `func` has none, the number is right, and its backward
    pass is an error. One case cannot be told, here as in any second derivative of PyTorch: a custom
    `torch.autograd.Function` whose backward takes for a constant what its forward computed on the
    way, such as a slope. Its gradient here is wrong. Let it save its inputs or outputs instead;
    `torch.autograd.gradgradcheck` tells whether it is right.

    Buffers, such as running statistics, change as in one evaluation of `func`.

    Args:
        func: F, from a state to a state of the same structure.
        equilibrium: h*, detached, of any structure.
        n_samples: the number of probes to average over.

    Returns:
        A scalar. `numel` counts all elements of the state, of the whole batch.

    Raises:
        ValueError: if `n_samples` is not a whole number of at least 1, or `func` or `equilibrium`
            break the contract (see `dpp.attach`).
        RuntimeError: inside a transform of `torch.func`, or in inference mode.
    """
    n_samples = positive_int("n_samples", n_samples)
    refuse_in_torch_func("dpp.jacobian_reg")
    refuse_in_inference_mode("dpp.jacobian_reg")
    check_equilibrium(equilibrium)
    leaves, structure = flatten(equilibrium)
    leaves = as_constants(leaves)  # forward mode would follow a solve without autograd, too
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
            with _buffers_kept():  # a checkpoint in F runs its modules again
                products = grad(outputs, inputs, probes, **options)
            # The squares, too: in 16 bits they overflow, or fall to zero.
            total = total + sum(p.abs().to(total.dtype).square().sum() for p in products)
    reg = total / (n_samples * sum(leaf.numel() for leaf in leaves))
    return reg if differentiable else reg.detach()


@never_compiled
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

    The latter decides whether a damped iteration converges ("On Training Implicit Models",
    supplement, eq. A-11). The method is restarted Arnoldi iteration with 20 vectors per sample, so
    that complex leading pairs are right. It costs one evaluation of `func` and at most `max_iter`
    vector-Jacobian products per factor.

    Args:
        func: F, from a state to a state of the same structure.
        equilibrium: h*, detached, of any structure.
        lam: the damping factor in (0, 1]; or several, which share one graph and each begin where
            the one before ended; or None for J itself.
        batch_dim: see `Context.batch_dim`.
        tol: a search stops when ||J^T y - theta y|| <= tol |theta| for the leading Ritz pair
            (theta, y) of every sample. For a normal J the relative error is then at most tol.
            Otherwise theta is exact for a J that differs by that much.
        max_iter: the largest number of products per factor. A search that ends there warns.

    Returns:
        The radius per sample, shape (B,); a scalar where samples are coupled. With several
        factors the radii are stacked along a new first dimension.

    Warns:
        ConvergenceWarning: once per run, if a search stopped short of `tol`.

    Raises:
        ValueError: if an argument is out of range, or `func` or `equilibrium` break the contract.
        NonFiniteError: if a product is NaN or infinite.
        RuntimeError: inside a transform of `torch.func`, or in inference mode.
    """
    tol, max_iter = positive_float("tol", tol), positive_int("max_iter", max_iter)
    factors = _factors(lam)
    check_batch_dim(batch_dim)
    check_equilibrium(equilibrium)
    # A measurement leaves buffers and random state as they were. A checkpoint in F runs its modules
    # again for each product, also for those that other processes need at the lockstep's end.
    with Trial(equilibrium), in_lockstep():
        checked = CheckedFunc(func, equilibrium)
        graph = Linearization(checked, equilibrium, "dpp.spectral_radius")
        packing, radii = _packing(graph, batch_dim), list[Tensor]()
        random = start = random_start(packing)
        for factor in factors:
            found = _leading(graph, packing, factor, start, tol, max_iter)
            radii.append(found.radius if packing.batch_dim is not None else found.radius.squeeze(0))
            # From the last eigenvector alone, a search would never find another, leading one.
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
    """Return the leading eigenvalue of the map damped by a factor. Warns where `tol` is missed."""

    def apply(x: Tensor) -> Tensor:
        image = packing.pack(graph.vjp(packing.unpack(x)))
        return image if factor is None else torch.lerp(x, image, factor)

    with torch.no_grad(), full_precision(packing.device):
        found = leading_eigenvalue(apply, start, tol=tol, max_vjp=max_vjp, basis=20)
    if not (found.residual <= tol).all():
        warn_once(
            "spectral_radius",
            f"spectral_radius: after {found.n_vjp} vector-Jacobian products the leading Ritz "
            f"pair has residual {found.residual.max():.1e}, above tol={tol:.1e}, so the radius may "
            "be off; raise max_iter or tol. This is said once per run.",
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


@contextmanager
def _buffers_kept() -> Iterator[None]:
    """Restore the buffers of modules that run inside a `with` block, and no random state."""
    buffers = Buffers()
    try:
        with buffers.noting():
            yield
    finally:
        buffers.put_back()


def _factors(lam: float | Sequence[float] | None) -> list[float | None]:
    """Return the damping factors, checked."""
    factors: list[Any] = list(lam) if isinstance(lam, Sequence) else [lam]
    valid = [f is None or (_is_number(f) and 0 < f <= 1) for f in factors]
    if not valid or not all(valid):
        raise ValueError(
            f"lam={lam!r}; expected a number in (0, 1], a sequence of such numbers, or None for J"
        )
    return factors


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
