"""Fixed-point iteration x <- rhs + J^T x."""

from __future__ import annotations

import torch
from torch import Tensor

from .clip import Clip
from .progress import Apply, Progress, Solution


def fixed_point(
    apply: Apply, rhs: Tensor, tol: float, max_vjp: int, clip: float | None = None
) -> Solution:
    """Solve (I - J^T) x = rhs by x <- rhs + J^T x; converges only where rho(J) < 1.

    Takes one product an iteration and keeps two vectors (Almeida 1987; Pineda 1987, "recurrent
    backpropagation").

    With `clip` no J^T x is longer than that many times the right-hand side, so that x stays bounded
    whatever rho(J) is: it solves x = rhs + clip(J^T x), and the system itself wherever J^T x is not
    longer in the end. The residual is that of the system.
    """
    bound = None if clip is None else Clip(rhs, clip)
    progress = Progress(apply, rhs, tol, max_vjp, bound)
    x, residual = rhs, torch.empty_like(rhs)
    while not progress.exhausted:
        image = rhs + progress.apply(x)
        if progress.record(x, torch.sub(image, x, out=residual)):
            break
        x = progress.choose(image, x)
    return progress.solution()
