"""How well one equilibrium does while a model trains, from few products."""

from __future__ import annotations

from ...contract.strategy import GradStrategy
from ...strategies import IFT
from .derivatives import cosine
from .problem import Problem

_REFERENCE = IFT(solver="gmres", tol=1e-5, max_iter=30)
_RADIUS_VJPS = 20


def health(problem: Problem, strategy: GradStrategy) -> dict[str, float]:
    """Return what `dpp.monitor` logs of a backward pass, by name.

    Args:
        problem: the equilibrium, with the dL/dh that came.
        strategy: the model's own.
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
