"""The reference of a report: the most exact gradient that the size of the problem allows."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contract.strategy import GradStrategy
from ...strategies import IFT, Exact
from ...strategies.measurement import POOR_REFERENCE
from .problem import Gradient, Problem

_DENSE_COLUMNS = 1024  # elements per sample, up to which a dense solve comes first
_REFERENCE_TOL, _REFERENCE_VJPS = 1e-8, 500


def solve_reference(problem: Problem) -> tuple[GradStrategy, Gradient]:
    """Return the most exact gradient that the problem's size allows, with the method behind it.

    For small states a dense solve comes first, and for larger ones GMRES. If the first leaves too
    large a residual, as GMRES does where eigenvalues of J surround 1, the other is tried as well. A
    dense solve is skipped if its matrices are too large. The gradient with the smaller residual is
    returned.
    """
    gmres = IFT(solver="gmres", tol=_tol(problem), max_iter=_REFERENCE_VJPS)
    methods: list[GradStrategy] = [gmres, Exact()]
    if problem.packing.columns <= _DENSE_COLUMNS:
        methods.reverse()
    found: list[tuple[GradStrategy, Gradient]] = []
    for method in methods:
        try:
            gradient = problem.differentiate(method)
        except ValueError as error:  # the matrices would be too large
            refused = error
            continue
        found.append((method, gradient))
        if gradient.residual <= POOR_REFERENCE:
            break
    if not found:
        raise refused
    return min(found, key=lambda pair: pair[1].residual)


def second_order_reference(problem: Problem) -> Tensor | None:
    """Return the second derivative to compare with, see `Problem.second_derivative`."""
    exact = IFT(tol=_tol(problem), max_iter=_REFERENCE_VJPS, higher_order=True)
    return problem.second_derivative(exact)


def _tol(problem: Problem) -> float:
    """Return the reference's tolerance: 1e-8, or ten roundings of the dtype if that is more."""
    return max(_REFERENCE_TOL, float(f"{10 * torch.finfo(problem.packing.dtype).eps:.0e}"))
