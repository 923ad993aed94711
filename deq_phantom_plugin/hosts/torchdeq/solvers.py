"""Our forward solvers in TorchDEQ's table of solvers: `f_solver="broyden_fast"` and others.

They see the user's state, while TorchDEQ's own solvers see one flat vector. They return the same
statistics. Options in `solver_kwargs`:

- `"compile": True`, or a mode of `torch.compile`, compiles F for the solve.
- `"check_every": m` looks at the residual in every m-th iteration only.
- `"solve_dtype": "bfloat16"` does most of the solve in 16 bits. It may also be a setting of
  `get_deq`. See `deq_phantom_plugin.forward.low_precision`.
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
    """Remove a solve's estimate of the inverse Jacobian from its statistics.

    Users may keep the statistics, and the estimate takes much memory.

    Returns:
        The statistics themselves if there is no estimate, else a copy of them that has the estimate
        as its attribute `inverse_jacobian`.
    """
    inverse = info.__dict__.pop("inverse_jacobian", None)
    if inverse is None:
        return info
    known = type(info)(info)
    known.inverse_jacobian = inverse
    return known


# The solvers are functions of this module, so that models that hold them can be pickled.


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
            "ls=True: broyden_fast takes full steps, without a line search. For a line search take "
            "f_solver='broyden'"
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
    """Solve as a solver of TorchDEQ does, by one of our solvers.

    Args:
        solve: our solver.
        accepted: the names of further options that the solver takes. Others are ignored, as
            TorchDEQ's own solvers ignore them.
        func: F, in TorchDEQ's form.
        x0: the initial state, in TorchDEQ's form.
        max_iter: see TorchDEQ's solvers.
        tol: see TorchDEQ's solvers.
        stop_mode: see TorchDEQ's solvers, "abs" or "rel".
        indexing: the iterations whose states are handed out.
        return_final: see TorchDEQ's solvers.
        check_every: iterations between two looks at the residual.
        compile: see `deq_phantom_plugin.forward`.
        solve_dtype: see `deq_phantom_plugin.forward`.
        **options: the further options.
    """
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
    """Return TorchDEQ's `SolverStat`; the spectral radius is left as -1, "not known"."""
    from torchdeq.solver.stat import SolverStat

    # The constructor would first make tensors for every entry, known or not. This saves the time.
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
"""Maps names for TorchDEQ's `f_solver` to our solvers, which have TorchDEQ's signature."""


def register() -> Callable[[], None]:
    """Add our solvers to TorchDEQ's table; return a function that removes them again."""
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
    """Whether a solver can return an estimate of the inverse Jacobian."""
    return solver is broyden_fast


def lacks_inverse_jacobian(solver: Any) -> bool:
    """Whether a function is a solver without such an estimate; of users' solvers nobody knows."""
    from torchdeq import solver as theirs

    own = (theirs.fixed_point_iter, theirs.simple_fixed_point_iter)
    return solver in (
        *own,
        theirs.anderson_solver,
        theirs.broyden_solver,
        anderson_fast,
        fixed_point_fast,
    )


def registered(name: Any) -> Any:
    """Return the function of TorchDEQ's name of a solver; None for a name that it refuses."""
    from torchdeq import solver

    return solver._solvers.get(name)


def checked_dtype(solve_dtype: Any, solver: Any) -> Any:
    """Return a `solve_dtype` if the solver can take it.

    Args:
        solve_dtype: see `check_solve_dtype`.
        solver: TorchDEQ's name of a solver, or the function.

    Raises:
        ValueError: if `solve_dtype` is invalid, or the solver is none of ours. Other solvers would
            compare residuals of 16 bits with the tolerance.
    """
    if check_solve_dtype(solve_dtype) is None or solver in SOLVERS or sees_states(solver):
        return solve_dtype
    name = solver if isinstance(solver, str) else getattr(solver, "__name__", solver)
    raise ValueError(
        f"solve_dtype={solve_dtype!r} with f_solver={name!r}; expected one of "
        f"{', '.join(SOLVERS)}, or solve_dtype=None: other solvers have no low precision"
    )


def sees_states(solver: Any) -> bool:
    """Whether a solver is one of ours, which see the user's state."""
    return any(solver is known for known in SOLVERS.values())
