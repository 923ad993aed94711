"""The most exact gradient that there is to compare with."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contract.strategy import GradStrategy
from ...strategies import IFT, Exact
from ...strategies.measurement import POOR_REFERENCE
from .problem import Gradient, Problem

_DENSE_COLUMNS = 1024  # elements of a sample up to which the reference is dense
_REFERENCE_TOL, _REFERENCE_VJPS = 1e-8, 500


def solve_reference(problem: Problem) -> tuple[GradStrategy, Gradient]:
    """Return the most exact gradient that the problem's size allows, and its method.

    Small states are solved densely. Larger ones by GMRES; where that stalls, as it does when
    eigenvalues of J surround 1, densely if the matrices fit into memory.
    """
    gmres = IFT(solver="gmres", tol=_tol(problem), max_iter=_REFERENCE_VJPS)
    methods: list[GradStrategy] = [gmres, Exact()]
    if problem.packing.columns <= _DENSE_COLUMNS:
        methods.reverse()
    found: list[tuple[GradStrategy, Gradient]] = []
    for method in methods:
        try:
            gradient = problem.differentiate(method)
        except ValueError:  # too large to be dense
            continue
        found.append((method, gradient))
        if gradient.residual <= POOR_REFERENCE:
            break
    return min(found, key=lambda pair: pair[1].residual)


def second_order_reference(problem: Problem) -> Tensor | None:
    """Return the second derivative as it is, see `Problem.second_derivative`."""
    exact = IFT(tol=_tol(problem), max_iter=_REFERENCE_VJPS, higher_order=True)
    return problem.second_derivative(exact)


def _tol(problem: Problem) -> float:
    return max(_REFERENCE_TOL, float(f"{10 * torch.finfo(problem.packing.dtype).eps:.0e}"))
