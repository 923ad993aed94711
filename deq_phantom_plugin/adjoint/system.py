"""The adjoint system of a state of any structure, solved on rows by the solver that a name names.

What is solved: (I - J^T) g = v, where g and v have the leaves of the state.

1. The leaves are packed into rows, shape (B, D), one row per sample (`Packing`).
2. Each row of v is divided by its norm, so that `tol` is relative in every sample (`_normalised`).
3. A solver works on the rows. It sees x -> J^T x in these units (`_on_rows`).
4. g has its norms back, and is unpacked into leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from .._plumbing.hints import hint
from ..contract.errors import NonFiniteError
from .anderson import anderson
from .bicgstab import bicgstab
from .broyden import broyden
from .fixed_point import fixed_point
from .gmres import gmres
from .packing import Packing
from .progress import Apply, Solution, choose

AdjointSolver = Callable[[Apply, Tensor, float, int], Solution]

SOLVERS: Mapping[str, AdjointSolver] = MappingProxyType(
    {
        "anderson": anderson,
        "bicgstab": bicgstab,
        "broyden": broyden,
        "fixed_point": fixed_point,
        "gmres": gmres,
    }
)


def check_solver(name: object) -> str:
    """Return `name` if it names an adjoint solver.

    Raises:
        ValueError: if it does not. The message lists the solvers.
    """
    if isinstance(name, str) and name in SOLVERS:
        return name
    valid = ", ".join(sorted(SOLVERS))
    raise ValueError(f"solver={name!r}{hint(name, SOLVERS)}; expected one of {valid}")


def solve(
    vjp: Callable[[Sequence[Tensor]], list[Tensor]],
    cotangents: Sequence[Tensor],
    *,
    solver: str | AdjointSolver,
    tol: float,
    max_vjp: int,
    batch_dim: int | None,
    start: Sequence[Tensor] | None = None,
    packing: Packing | None = None,
    without_broken: bool = False,
) -> tuple[list[Tensor], Solution]:
    """Solve (I - J^T) g = v, with a Krylov space, a stop and a residual per sample.

    The residual is that of the system with all of J. So it shows where samples depend on one
    another after all. A sample whose v is not finite gets g = v, so that `GradScaler` sees the
    overflow.

    Args:
        vjp: from the leaves of a state x to the leaves of J^T x.
        cotangents: the leaves of v.
        solver: a name in `SOLVERS`, or a function like those.
        tol: the relative residual ||v - (I - J^T) g|| / ||v|| to reach in every sample.
        max_vjp: the largest number of calls of `vjp`.
        batch_dim: see `Context.batch_dim`.
        start: the leaves of a first guess of g. It costs one more call of `vjp`, and is used in the
            samples where it is better than zero.
        packing: the packing of the rows that the solver sees; None makes one for the cotangents.
        without_broken: whether a sample in which the solve makes a NaN or an infinity gets zero
            and an infinite residual, while the others are solved again without it.

    Returns:
        The leaves of g, and the solver's result for a v whose rows have norm one.

    Raises:
        NonFiniteError: if the solve makes a NaN or an infinity out of a finite v, unless
            `without_broken`.
    """
    packing = Packing(cotangents, batch_dim) if packing is None else packing
    rhs = packing.pack(cotangents)
    unit, length, finite = _normalised(rhs)
    scale = None
    if packing.rows > 1:
        scale = _relative(length, packing)
        if packing.is_half and packing.rows:
            # Rows that are too short for that keep their size relative to the longest row.
            unit, length = unit * length / (scale * length.amax()), scale * length.amax()
    apply = _on_rows(vjp, packing, scale)
    function = SOLVERS[solver] if isinstance(solver, str) else solver

    def solved(unit: Tensor) -> Solution:
        if start is None or max_vjp < 3:
            return function(apply, unit, tol, max_vjp)
        return _from_start(function, apply, unit, tol, max_vjp, packing.pack(start) / length)

    solution = _without_broken(solved, unit) if without_broken else solved(unit)
    g = choose(finite, solution.x * length, rhs)
    return packing.unpack(g), solution


def _on_rows(
    vjp: Callable[[Sequence[Tensor]], list[Tensor]], packing: Packing, scale: Tensor | None
) -> Apply:
    """Return x -> J^T x on rows, each of which is in its own unit, `scale`.

    The units matter where one row reaches into another. J^T is applied to the rows in the user's
    units, so that the residual is that of the user's system.
    """
    if scale is None:
        return lambda x: packing.pack(vjp(packing.unpack(x)))
    return lambda x: packing.pack(vjp(packing.unpack(x * scale))) / scale


def _without_broken(solved: Callable[[Tensor], Solution], rhs: Tensor) -> Solution:
    """Solve; where that makes a NaN or an infinity in samples, solve again without them."""
    broken = rhs.new_zeros(len(rhs), dtype=torch.bool)
    while True:
        try:
            found = solved(rhs.masked_fill(broken[:, None], 0))
        except NonFiniteError as error:
            new = [sample for sample in error.samples if not broken[sample]]
            if not new:  # the samples are not known, or are out already
                raise
            broken[new] = True
            continue
        if not bool(broken.any()):
            return found
        return replace(
            found,
            x=found.x.masked_fill(broken[:, None], 0),
            residual=found.residual.masked_fill(broken, torch.inf),
            converged=False,
        )


def _normalised(rhs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows of norm one, their norms, shape (B, 1), and the rows that are finite, shape (B,).

    Rows of zeros stay zero, and get the norm of the longest row: where other rows reach into them,
    they are small or large relative to that. Rows that are not finite become zero.
    """
    info = torch.finfo(rhs.dtype)
    length = torch.linalg.vector_norm(rhs, dim=1, keepdim=True)
    safe = (length > 1e4 * info.tiny**0.5) & (length < 1e-4 * info.max**0.5)
    if rhs.device.type == "cpu" and bool(safe.all()):  # another device would have to be waited for
        return rhs * (1 / length), length, safe.squeeze(1)
    # Scaled before the norm is taken: its squares overflow for large rows and vanish for tiny ones.
    largest = rhs.new_zeros(len(rhs), 1)
    if rhs.shape[1]:
        largest = torch.linalg.vector_norm(rhs, ord=torch.inf, dim=1, keepdim=True)
    finite = torch.isfinite(largest)
    usable = finite & (largest > 0)
    largest = torch.where(usable, largest, 1)
    unit = torch.where(usable, rhs / largest, 0)
    length = torch.where(usable, torch.linalg.vector_norm(unit, dim=1, keepdim=True), 1)
    unit, length = unit / length, torch.where(usable, length * largest, 0)
    if len(length):
        longest = length.amax()
        length = torch.where(usable, length, torch.where(longest > 0, longest, 1))
    return unit, length, finite.squeeze(1)


def _relative(length: Tensor, packing: Packing) -> Tensor:
    """Return the norms over the largest norm, shape (B, 1), bounded from below."""
    # In float16 products of much shorter rows would be lost. Otherwise the range of the dtype
    # counts.
    least = 2.0**-6 if packing.is_half else 1e8 * torch.finfo(length.dtype).tiny
    return (length / length.amax()).clamp(min=least) if len(length) else length


def _from_start(
    solver: AdjointSolver, apply: Apply, rhs: Tensor, tol: float, max_vjp: int, start: Tensor
) -> Solution:
    """Solve for the difference between g and a first guess."""
    missing, n_vjp = rhs - start + apply(start), 1
    better = torch.linalg.vector_norm(missing, dim=1) < torch.linalg.vector_norm(rhs, dim=1)
    dropped = ~better & (start != 0).any(dim=1)
    if bool(dropped.any()):  # dropped rows may have reached into others, so the rest is asked again
        start = start.masked_fill(dropped[:, None], 0)
        missing, n_vjp = rhs - start + apply(start), 2
    found = solver(apply, missing, tol, max_vjp - n_vjp)
    return replace(found, x=start + found.x, n_vjp=found.n_vjp + n_vjp)
