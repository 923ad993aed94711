"""Our forward solvers in TorchDEQ's table: `f_solver="broyden_fast"` and the like.

They see the user's state where TorchDEQ's own see one flat vector, and fill in the same statistics.
`solver_kwargs={"compile": True}`, or a mode of `torch.compile`, compiles F for the solve, and
`{"check_every": m}` looks at the residual in every m-th iteration. `solve_dtype="bfloat16"`, there
or among the settings of `get_deq`, takes most of the solve in 16 bits, see
`deq_phantom_plugin.forward.low_precision`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...contract.state import State
from ...forward import ForwardSolution, anderson, broyden, check_solve_dtype, fixed_point
from .form import Form

_Solved: TypeAlias = tuple[State, list[State], Any]


def take_inverse_jacobian(info: Any) -> Any:
    """Take what a solve learned of the inverse Jacobian away from its statistics.

    Users keep statistics, and the vectors behind an estimate are many.

    Returns:
        The same statistics, with `inverse_jacobian` as an attribute if there is one.
    """
    inverse = info.__dict__.pop("inverse_jacobian", None)
    if inverse is None:
        return info
    known = type(info)(info)
    known.inverse_jacobian = inverse
    return known


# Functions of this module, so that models which hold them can be copied and pickled.


def anderson_fast(func: Any, x0: State, **options: Any) -> _Solved:
    """Solve by Anderson acceleration; for the options see TorchDEQ's `anderson_solver`."""
    return _solve(anderson, ("m", "lam", "tau"), func, x0, **options)


def broyden_fast(func: Any, x0: State, *, ls: bool = False, **options: Any) -> _Solved:
    """Solve by Broyden's method; for the options see TorchDEQ's `broyden_solver`.

    Raises:
        ValueError: if a line search is asked for.
    """
    if ls:
        raise ValueError(
            "ls=True: broyden_fast takes full steps; use f_solver='broyden' for a line search"
        )
    memory = options.pop("LBFGS_thres", None)
    return _solve(broyden, ("memory", "keep_inverse"), func, x0, memory=memory, **options)


def fixed_point_fast(func: Any, x0: State, **options: Any) -> _Solved:
    """Solve by fixed-point iteration; for the options see TorchDEQ's `fixed_point_iter`."""
    return _solve(fixed_point, ("tau",), func, x0, **options)


def _solve(
    solve: Callable[..., ForwardSolution],
    accepted: Sequence[str],
    func: Any,
    x0: State,
    max_iter: int = 50,
    tol: float = 1e-3,
    stop_mode: str = "abs",
    indexing: Sequence[int] | None = None,
    return_final: bool = False,
    check_every: int = 1,
    compile: bool | str = False,
    solve_dtype: Any = None,
    **options: Any,
) -> _Solved:
    """Solve in TorchDEQ's form; options that a solver has no use for are ignored, as there."""
    form = Form(func)
    solution = solve(
        form.func,
        form.unpack(x0),
        max_iter=int(max_iter),
        tol=tol,
        stop_mode=stop_mode,
        sample_at=indexing or (),
        return_final=return_final,
        check_every=check_every,
        compile=compile,
        solve_dtype=solve_dtype,
        **{name: value for name, value in options.items() if name in accepted},
    )
    info = _statistics(
        abs_lowest=solution.abs_lowest,
        rel_lowest=solution.rel_lowest,
        abs_trace=solution.abs_trace,
        rel_trace=solution.rel_trace,
        nstep=solution.n_steps,
    )
    if solution.inverse_jacobian is not None:
        info.inverse_jacobian = solution.inverse_jacobian
    return form.pack(solution.state), [form.pack(state) for state in solution.sampled], info


def _statistics(**known: Tensor) -> Any:
    """Return TorchDEQ's `SolverStat` of what a solver knows, which is all but the radius."""
    from torchdeq.solver.stat import SolverStat

    # Its constructor makes tensors of all that might not be known before it looks at what is.
    info = SolverStat.__new__(SolverStat)
    info.update(known, sradius=torch.tensor([-1.0]))
    return info


SOLVERS: Mapping[str, Callable[..., _Solved]] = MappingProxyType(
    {
        "anderson_fast": anderson_fast,
        "broyden_fast": broyden_fast,
        "fixed_point_fast": fixed_point_fast,
    }
)
"""TorchDEQ's name -> a solver of its signature."""


def register() -> Callable[[], None]:
    """Add the solvers to TorchDEQ's table; return what takes them out again."""
    from torchdeq import solver

    before = dict(solver._solvers)
    for name, function in SOLVERS.items():
        solver.register_solver(name, function)

    def restore() -> None:
        for name, function in SOLVERS.items():
            if solver._solvers.get(name) is function:
                del solver._solvers[name]
                if name in before:
                    solver._solvers[name] = before[name]

    return restore


def keeps_inverse_jacobian(solver: Any) -> bool:
    """Whether a solver can hand out what it learned of the inverse Jacobian."""
    return solver is broyden_fast


def checked_dtype(solve_dtype: Any, solver: Any) -> Any:
    """Return a `solve_dtype`, if a solver can take it.

    Args:
        solve_dtype: see `check_solve_dtype`.
        solver: TorchDEQ's name of a solver, or the function.

    Raises:
        ValueError: if it is none, or the solver is TorchDEQ's own or a user's, which would compare
            residuals of 16 bits with the tolerance.
    """
    if check_solve_dtype(solve_dtype) is None or solver in SOLVERS or sees_states(solver):
        return solve_dtype
    name = solver if isinstance(solver, str) else getattr(solver, "__name__", solver)
    raise ValueError(
        f"solve_dtype={solve_dtype!r} with f_solver={name!r}; expected one of "
        f"{', '.join(SOLVERS)}, or solve_dtype=None"
    )


def sees_states(solver: Any) -> bool:
    """Whether a solver is one of ours."""
    return any(solver is known for known in SOLVERS.values())
