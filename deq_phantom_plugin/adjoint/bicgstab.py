"""The stabilised biconjugate gradient method (BiCGSTAB).

The residual that the method carries along drifts from the true residual. So where the former says
"solved", the true one is computed, and where that is above the tolerance the method starts again
from there. No residual is followed below the rounding of F's own products: solves of more than a
few iterations measure that, with one product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._plumbing.late_read import LateRead
from .fixed_point import fixed_point
from .progress import Apply, Progress, Solution

_FEW = 5  # iterations, after which the rounding of F is measured


def bicgstab(apply: Apply, rhs: Tensor, tol: float, max_vjp: int) -> Solution:
    """Solve (I - J^T) x = rhs by BiCGSTAB, with a Krylov space per sample.

    Source: van der Vorst 1992, "Bi-CGSTAB". Costs two products per iteration. Memory holds six
    vectors per sample, however many iterations there are.

    Args:
        apply: x -> J^T x, on rows of shape (B, D).
        rhs: rows of norm one, or of zeros, shape (B, D).
        tol: the residual ||rhs - (I - J^T) x|| to reach in every sample.
        max_vjp: the largest number of products.

    Raises:
        NonFiniteError: if a product makes a NaN or an infinity in a sample that is being solved.
    """
    if max_vjp < 3:  # too few for one iteration and a true residual
        return fixed_point(apply, rhs, tol, max_vjp)
    progress = Progress(apply, rhs, tol, max_vjp)
    tiny = torch.finfo(rhs.dtype).tiny

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dim=1, keepdim=True)

    def divide(a: Tensor, b: Tensor) -> Tensor:
        usable = b.abs() > tiny
        return torch.where(usable, a / torch.where(usable, b, 1), 0)

    x, residual = torch.zeros_like(rhs), rhs
    rounding = rhs.new_zeros(())
    while not progress.exhausted:
        shadow = direction = residual
        rho = dot(shadow, residual)
        running, flags, steps = progress.active, LateRead(rhs.device), 0
        # One product is kept back for the true residual at the end.
        while progress.remaining > 2:
            image = (probed := direction) - progress.apply(direction)
            alpha = divide(rho, dot(shadow, image)) * running[:, None]
            middle = residual - alpha * image
            other = middle - progress.apply(middle)
            omega = divide(dot(other, middle), dot(other, other)) * running[:, None]
            x = x + alpha * direction + omega * middle
            residual = torch.where(running[:, None], middle - omega * other, residual)
            old_rho, rho = rho, dot(shadow, residual)
            beta = divide(rho, old_rho) * divide(alpha, omega)
            direction = residual + beta * (direction - omega * image)
            norm = torch.linalg.vector_norm(residual, dim=1)
            stuck = (omega.squeeze(1) == 0) | (rho.squeeze(1).abs() <= tiny)
            counted = running
            steps += 1
            if steps == _FEW and tol > 0 and progress.remaining > 2:
                rounding = progress.rounding(probed, probed - image)
            floor = rounding * torch.linalg.vector_norm(x, dim=1)
            running = running & (norm > floor.clamp(min=tol)) & ~stuck
            if not progress.go_on(running, norm, counted, flags):
                break
        residual = rhs - x + progress.apply(x)
        if progress.record(x, residual, at_once=True) or progress.remaining <= 2:
            break
    return progress.solution()
