"""The stabilised biconjugate gradient method."""

from __future__ import annotations

import torch
from torch import Tensor

from ..late_read import LateRead
from .fixed_point import fixed_point
from .progress import Apply, Progress, Solution


def bicgstab(apply: Apply, rhs: Tensor, tol: float, max_vjp: int) -> Solution:
    """Solve (I - J^T) x = rhs by BiCGSTAB (van der Vorst 1992), a Krylov space for each sample.

    Takes two products an iteration and keeps six vectors, however many iterations. The residual
    it carries along drifts from the true one; so whenever that one says "solved", the true one is
    computed, and if they differ the method starts again from there.
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
    while not progress.exhausted:
        shadow = direction = residual
        rho = dot(shadow, residual)
        running, flags = progress.active, LateRead(rhs.device)
        # One product is kept back for the true residual at the end.
        while progress.remaining > 2:
            image = direction - progress.apply(direction)
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
            running = running & (norm > progress.tol) & ~stuck
            if not progress.go_on(running, norm, counted, flags):
                break
        residual = rhs - x + progress.apply(x)
        if progress.record(x, residual, at_once=True) or progress.remaining <= 2:
            break
    return progress.solution()
