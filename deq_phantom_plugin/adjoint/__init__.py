"""Solvers of the adjoint system (I - J^T) g = v, and the graph of F that they work on.

A solver is a function of (apply, rhs, tol, max_vjp) on (B, D) matrices, one file each; `solve`
calls one by name on the leaves of any state.
"""

from __future__ import annotations

from .broyden import broyden
from .clip import Clip
from .fixed_point import fixed_point
from .implicit import VJP, implicit
from .krylov import KrylovSpace
from .linearization import Linearization, inside_checkpoint, mixes_samples
from .packing import Packing, batch_size, relative_norm, wide_dtype
from .progress import Apply, Solution
from .pushforward import Pushforward
from .repeats import Repeats
from .scales import drowns
from .system import SOLVERS, AdjointSolver, check_solver, solve

__all__ = [
    "SOLVERS",
    "VJP",
    "AdjointSolver",
    "Apply",
    "Clip",
    "KrylovSpace",
    "Linearization",
    "Packing",
    "Pushforward",
    "Repeats",
    "Solution",
    "batch_size",
    "broyden",
    "check_solver",
    "drowns",
    "fixed_point",
    "implicit",
    "inside_checkpoint",
    "mixes_samples",
    "relative_norm",
    "solve",
    "wide_dtype",
]
