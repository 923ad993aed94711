"""What the Transformer adapters share: an equilibrium that TorchDEQ solves.

`make_equilibrium` builds TorchDEQ's module from checked settings. `solvable` prepares F. `solve`
returns the state and an `EquilibriumInfo`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.calls import Counted
from deq_phantom_plugin._plumbing.compilation import compiled, never_compiled
from deq_phantom_plugin._plumbing.extras import require
from deq_phantom_plugin._plumbing.trial import Trial
from deq_phantom_plugin.adjoint import relative_norm
from deq_phantom_plugin.draws import SameDraws
from deq_phantom_plugin.hosts.torchdeq.solvers import checked_dtype
from deq_phantom_plugin.strategies.arguments import boolean

__all__ = [
    "EquilibriumInfo",
    "change_solver",
    "check_settings",
    "make_equilibrium",
    "solvable",
    "solve",
    "start",
]


@dataclass
class EquilibriumInfo(ModelOutput):
    """The result and the cost of a forward solve; nothing in it carries an autograd graph.

    Attributes:
        residual: the lowest ||F(h) - h|| / ||F(h)|| that each sample reached, shape (B,). Padding
            does not count.
        nfe: the number of evaluations of F in the solve of the batch, an integer tensor, shape ().
    """

    residual: Tensor | None = None
    nfe: Tensor | None = None


def check_settings(
    grad: Any,
    f_solver: str,
    f_max_iter: int,
    f_tol: float,
    solve_dtype: Any = None,
    grad_in_eval: bool = False,
) -> None:
    """Check the settings of an equilibrium before it is built.

    Args:
        grad: a spec of `dpp.get_strategy`.
        f_solver: TorchDEQ's name of a solver.
        f_max_iter: the largest number of iterations of the forward solve.
        f_tol: the relative residual at which the forward solve stops.
        solve_dtype: "bfloat16" or "float16" to compute most of the solve in this dtype; None for
            the dtype of the state.
        grad_in_eval: whether the gradient is attached in evaluation mode too.

    Raises:
        ValueError: if a setting is invalid; the message names its value and what is accepted.
        ImportError: if TorchDEQ is not installed.
    """
    dpp.get_strategy(grad)
    boolean("grad_in_eval", grad_in_eval)
    dpp.enable("torchdeq")  # this adds the solvers of this package to TorchDEQ's
    known = require("torchdeq.solver", "text")._solvers
    if f_solver not in known:
        raise ValueError(f"f_solver={f_solver!r}; expected one of {', '.join(sorted(known))}")
    # With fewer than 3 iterations, TorchDEQ's Anderson solver returns its initial state.
    least = 3 if f_solver == "anderson" else 1
    if isinstance(f_max_iter, bool) or not isinstance(f_max_iter, int) or f_max_iter < least:
        raise ValueError(
            f"f_max_iter={f_max_iter!r}; expected a whole number of at least {least} for {f_solver}"
        )
    if isinstance(f_tol, bool) or not isinstance(f_tol, int | float) or not 0 <= f_tol < 1:
        raise ValueError(f"f_tol={f_tol!r}; expected a number of at least 0 and below 1")
    checked_dtype(solve_dtype, f_solver)


def make_equilibrium(
    grad: Any,
    f_solver: str,
    f_max_iter: int,
    f_tol: float,
    solve_dtype: Any = None,
    grad_in_eval: bool = False,
) -> nn.Module:
    """Return TorchDEQ's module with these settings; for the arguments see `check_settings`."""
    check_settings(grad, f_solver, f_max_iter, f_tol, solve_dtype, grad_in_eval)
    settings = {"f_solver": f_solver, "f_max_iter": f_max_iter, "f_tol": f_tol}
    settings |= {"f_stop_mode": "rel", "grad": grad, "grad_in_eval": grad_in_eval}
    deq: nn.Module = require("torchdeq", "text").get_deq({**settings, "solve_dtype": solve_dtype})
    return deq


def change_solver(
    deq: nn.Module, f_solver: str, f_max_iter: int, f_tol: float, solve_dtype: Any = None
) -> None:
    """Give an equilibrium another forward solver; its gradient and its memory stay.

    Args:
        deq: a module from `make_equilibrium`.
        f_solver: see `check_settings`.
        f_max_iter: see `check_settings`.
        f_tol: see `check_settings`.
        solve_dtype: see `check_settings`.
    """
    new: Any = make_equilibrium("jfb", f_solver, f_max_iter, f_tol, solve_dtype)
    # The attributes that TorchDEQ and its host derive from these settings.
    derived = ("f_solver", "no_stat", "f_max_iter", "eval_f_max_iter", "f_tol", "indexing")
    for name in (*derived, "solve_dtype"):
        setattr(deq, name, getattr(new, name))
    settings: Any = deq.args
    settings.update(f_solver=f_solver, f_max_iter=f_max_iter, f_tol=f_tol, solve_dtype=solve_dtype)


def solvable(
    func: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    real: Tensor | None,
    compile: bool | str = False,
    owner: nn.Module | None = None,
) -> Callable[[Tensor], Tensor]:
    """Return F prepared for a solve: every evaluation has the same random draws, such as dropout.

    Args:
        func: F in the dtype of the model, from and to shape (B, L, hidden_size).
        dtype: the dtype of the model.
        real: True for tokens and False for padding, shape (B, L, 1); None without padding.
        compile: whether to compile F, or a mode of `torch.compile`. The second length of sequences
            causes one more compilation, of code for all lengths.
        owner: the module that keeps its compiled code.
    """

    def image(state: Tensor) -> Tensor:
        found = func(state.to(dtype)).to(state.dtype)
        # The states of padding stay zero, so they add nothing to a residual.
        return found if real is None else found.where(real, 0)

    return SameDraws(compiled(image, compile, owner, dynamic=None))


def start(like: Tensor) -> Tensor:
    """Return the initial state: zeros with the shape of `like`, in at least 32 bits."""
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))


def solve(
    deq: nn.Module, func: Callable[[Tensor], Tensor], like: Tensor
) -> tuple[Tensor, EquilibriumInfo]:
    """Solve h = F(h) from zero.

    Args:
        deq: a module from `make_equilibrium`. In training mode, or with `grad_in_eval`, the state
            carries its gradient.
        func: F, from and to shape (B, ...).
        like: a tensor with the shape of the state, in the dtype of the model.

    Returns:
        The equilibrium, and what the solve reached and cost.
    """
    counted = Counted(func)
    # `solve_dtype` has no effect in a model of 16 bits. TorchDEQ sees a state of 32 bits here.
    in_16_bits = like.dtype in (torch.bfloat16, torch.float16)
    options = {"solve_dtype": None} if in_16_bits else None
    states, info = deq(counted, start(like), solver_kwargs=options)
    state: Tensor = states[-1]
    # If a strategy owns the solve, TorchDEQ does not measure a residual.
    known = counted.calls.by_solver()
    residual = info["rel_lowest"].detach() if known else _residual(func, state.detach())
    return state, EquilibriumInfo(residual=residual, nfe=counted.calls.of_solve())


@never_compiled
@torch.no_grad()
def _residual(func: Callable[[Tensor], Tensor], state: Tensor) -> Tensor:
    with Trial(state):
        image = func(state)
    return relative_norm((image - state).flatten(1), image.flatten(1))
