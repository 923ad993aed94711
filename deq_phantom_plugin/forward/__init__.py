"""Solvers of the equilibrium itself, h = F(h), on any state; one file each.

The host hooks register them with their frameworks, as `broyden_fast`, `anderson_fast` and
`fixed_point_fast`; without a framework they are called as functions.
"""

from .anderson import anderson
from .broyden import broyden
from .fixed_point import fixed_point
from .last_solve import Judge, LastSolve
from .low_precision import check_solve_dtype
from .solution import ForwardSolution, InverseJacobian
from .warm_start import SampleStarts

__all__ = [
    "ForwardSolution",
    "InverseJacobian",
    "Judge",
    "LastSolve",
    "SampleStarts",
    "anderson",
    "broyden",
    "check_solve_dtype",
    "fixed_point",
]
