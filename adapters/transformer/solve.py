"""What the Transformer adapters share: one equilibrium solved by TorchDEQ, and what it tells."""

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
    """What a forward solve reached and spent; nothing in it carries an autograd graph.

    Attributes:
        residual: ||F(h) - h|| / ||F(h)|| of each sample, the lowest that was reached, shape (B,);
            padding does not count.
        nfe: evaluations of F that the solve took for the batch, an integer tensor of shape ().
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
    """Refuse settings of an equilibrium before there is one.

    Args:
        grad: a spec of `dpp.get_strategy`.
        f_solver: TorchDEQ's name of a solver.
        f_max_iter: the most iterations of the forward solve.
        f_tol: relative residual at which it stops.
        solve_dtype: "bfloat16" or "float16" to take most of the solve in it.
        grad_in_eval: whether the gradient is attached in evaluation mode too.

    Raises:
        ValueError: names the value and what is accepted.
        ImportError: without TorchDEQ.
    """
    dpp.get_strategy(grad)
    boolean("grad_in_eval", grad_in_eval)
    dpp.enable("torchdeq")  # which adds solvers of its own
    known = require("torchdeq.solver", "text")._solvers
    if f_solver not in known:
        raise ValueError(f"f_solver={f_solver!r}; expected one of {', '.join(sorted(known))}")
    # TorchDEQ's Anderson returns its initial state below 3.
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
    """Return TorchDEQ's module with a gradient chosen by name; see `check_settings`."""
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
        deq: of `make_equilibrium`.
        f_solver: see `check_settings`, as the others.
        f_max_iter: see there.
        f_tol: see there.
        solve_dtype: see there.
    """
    new: Any = make_equilibrium("jfb", f_solver, f_max_iter, f_tol, solve_dtype)
    # What TorchDEQ and its host derive from these.
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
    """Return F as it is solved: with the same draws, such as dropout, at every evaluation.

    Args:
        func: F in the dtype of the model.
        dtype: that dtype.
        real: where tokens are and no padding, shape (B, L, 1); None for everywhere.
        compile: whether to compile F, or a mode of `torch.compile`. Another length of sequences is
            one more compilation, of code for all lengths.
        owner: the module that has compiled code of its own.
    """

    def image(state: Tensor) -> Tensor:
        found = func(state.to(dtype)).to(state.dtype)
        # Padding rests at zero, where it adds nothing to any residual.
        return found if real is None else found.where(real, 0)

    return SameDraws(compiled(image, compile, owner, dynamic=None))


def start(like: Tensor) -> Tensor:
    """Return the initial state, zero: solvers want more than half precision."""
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))


def solve(
    deq: nn.Module, func: Callable[[Tensor], Tensor], like: Tensor
) -> tuple[Tensor, EquilibriumInfo]:
    """Solve h = F(h) from zero.

    Args:
        deq: of `make_equilibrium`; in training mode the state carries its gradient, and in
            evaluation mode where it was told to.
        func: F, from and to shape (B, ...).
        like: a tensor of the state's shape, in the model's dtype.
    """
    counted = Counted(func)
    # Of a model in 16 bits there is nothing to lower, which its state does not show.
    in_16_bits = like.dtype in (torch.bfloat16, torch.float16)
    options = {"solve_dtype": None} if in_16_bits else None
    states, info = deq(counted, start(like), solver_kwargs=options)
    state: Tensor = states[-1]
    # Where a strategy owns the solve, TorchDEQ has no residual.
    known = counted.calls.by_solver()
    residual = info["rel_lowest"].detach() if known else _residual(func, state.detach())
    return state, EquilibriumInfo(residual=residual, nfe=counted.calls.of_solve())


@never_compiled
@torch.no_grad()
def _residual(func: Callable[[Tensor], Tensor], state: Tensor) -> Tensor:
    with Trial(state):
        image = func(state)
    return relative_norm((image - state).flatten(1), image.flatten(1))
