"""The numbers that a monitor logs of one equilibrium, from few products.

The reference takes at most 30 products, and the spectral radius 20.
"""

from __future__ import annotations

from ...contract.strategy import GradStrategy
from ...strategies import IFT
from .derivatives import cosine
from .problem import Problem

_REFERENCE = IFT(solver="gmres", tol=1e-5, max_iter=30)
_RADIUS_VJPS = 20


def health(problem: Problem, strategy: GradStrategy) -> dict[str, float]:
    """Return the numbers that `dpp.monitor` logs of a backward pass, by name.

    Args:
        problem: the equilibrium, with a loss whose gradient is the dL/dh of that backward pass.
        strategy: the strategy of the model.
    """
    problem, whole = problem.settled(problem.inspect().coupled)
    own, reference = problem.differentiate(strategy), whole.differentiate(_REFERENCE)
    (radius,) = whole.radii([1.0], _RADIUS_VJPS).values()
    return {
        "clipped": float(own.n_clipped),
        "adjoint_residual": own.residual,
        "spectral_radius": radius,
        "cosine": cosine(own.vector, reference.vector),
        "reference_residual": reference.residual,
    }
