"""A solve in 16 bits whose end is in the model's own precision."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .._plumbing.compilation import never_compiled
from .._plumbing.once import warn_once
from .._plumbing.precision import autocasts, under_autocast
from ..adjoint import Packing
from ..contract.errors import AssumptionWarning
from ..contract.state import State, flatten, unflatten
from .solution import ForwardSolution
from .tracking import chosen, relative

Func = Callable[[State], State]
Solver = Callable[..., ForwardSolution]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def check_solve_dtype(solve_dtype: Any) -> torch.dtype | None:
    """Return the dtype that evaluations of a solve are autocast to, None for the model's own.

    Args:
        solve_dtype: None, or "bfloat16" or "float16", by name or as PyTorch's dtype.

    Raises:
        ValueError: if it is neither.
    """
    if solve_dtype is None:
        return None
    if isinstance(solve_dtype, str) and solve_dtype in DTYPES:
        return DTYPES[solve_dtype]
    if isinstance(solve_dtype, torch.dtype) and solve_dtype in DTYPES.values():
        return solve_dtype
    raise ValueError(
        f"solve_dtype={solve_dtype!r:.60}; expected None for the model's own precision, or "
        f"{', '.join(map(repr, DTYPES))}"
    )


def may_solve_low(beyond: int = 0, unseen: int = 0) -> Callable[[Solver], Solver]:
    """Let a solver of (func, start, ...) take `solve_dtype` as well.

    The solver then solves twice, in `max_iter` iterations together:

    1. F is evaluated under autocast. This ends where every sample is at the tolerance, is at a
       relative residual of the dtype's epsilon, or has found no better state for some iterations.
       All evaluations but one may go there, and with `return_final` they do. Where the budget ends
       first, the residual is what 16 bits leave, and it is told.
    2. F is evaluated as it is, from there on, unless its first evaluation finds every sample at the
       tolerance. The state that is returned, and its residual, are from these evaluations: no
       residual of 16 bits ends the solve or chooses its state. What the first part learned about
       the Jacobian is not used. For that an MDEQ took up to 7 evaluations more, of 32.

    The very first evaluation is in the model's precision too. So what F keeps of it (a mask that is
    drawn once, a weight in `parametrize.cached()`, lazy parameters) is the model's own. Statistics
    that F updates each time see both precisions. States and the solver's linear algebra are in the
    state's dtype throughout. Traces begin with residuals of 16 bits. Autocast is entered once
    around the first part, so that it casts each parameter once.

    Where autocast would change nothing, the solve is the usual one, and a warning says so once.
    That is so under the caller's autocast, where F is in 16 bits already, and with states that are
    not in float32, since autocast casts no other. A budget too small for two parts goes to the
    usual solve too.

    Args:
        beyond: the number of evaluations that the solver takes beyond `max_iter`.
        unseen: the number of first evaluations whose residuals the solver does not look at.
    """
    least = unseen - beyond + 1  # iterations; also the number of the first that is looked at

    def decorate(solver: Solver) -> Solver:
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(solver).parameters.items()
            if parameter.default is not parameter.empty
        }

        @functools.wraps(solver)
        def solve(
            func: Func,
            start: State,
            *,
            solve_dtype: str | torch.dtype | None = None,
            **options: Any,
        ) -> ForwardSolution:
            dtype = check_solve_dtype(solve_dtype)
            if dtype is None:
                return solver(func, start, **options)
            settings = {**defaults, **options}
            _refuse(solve_dtype, settings)
            if settings["max_iter"] <= least or not _lowers(dtype, start):
                return solver(func, start, **options)
            solving = _Solving(solver, settings, beyond, unseen)
            return solving.to_the_end(func, solving.in_16_bits(func, start, dtype))

        return solve

    return decorate


def _refuse(solve_dtype: Any, settings: dict[str, Any]) -> None:
    """Refuse options that need more of a solve than its end."""
    if settings.get("keep_inverse"):
        raise ValueError(
            f"solve_dtype={solve_dtype!r} with keep_inverse=True: residuals of 16 bits are too "
            "coarse to estimate the Jacobian from; expected solve_dtype=None for shine"
        )
    steps, last = list(settings["sample_at"]), settings["max_iter"]
    if len(set(steps)) > 1 or any(step < last for step in steps):
        raise ValueError(
            f"solve_dtype={solve_dtype!r} with sample_at={steps}: only the last state is in the "
            f"model's precision; expected solve_dtype=None, or sample_at=[{last}]"
        )


def _lowers(dtype: torch.dtype, start: State) -> bool:
    """Whether autocast would change an evaluation of F. Warns once where it would not."""
    leaves = flatten(start)[0]
    kind = leaves[0].device.type
    if autocasts(kind):
        why = "under torch.autocast F is evaluated in 16 bits already"
    elif not any(leaf.dtype == torch.float32 for leaf in leaves):
        why = f"autocast casts float32 alone, and the state is in {leaves[0].dtype}"
    elif not torch.amp.is_autocast_available(kind):
        why = f"the device {kind!r} has no autocast"
    else:
        return True
    warn_once(
        f"solve_dtype without effect: {why}",
        f"solve_dtype={dtype} has no effect: {why}. Leave it out. This is said once.",
        AssumptionWarning,
    )
    return False


class _Solving:
    """The two parts of a solve.

    Args:
        solver: the solver.
        settings: all its options.
        beyond: see `may_solve_low`.
        unseen: see `may_solve_low`.
    """

    def __init__(self, solver: Solver, settings: dict[str, Any], beyond: int, unseen: int) -> None:
        self._solver, self._settings = solver, {**settings, "sample_at": ()}
        self._samples = bool(settings["sample_at"])
        self._evaluations = settings["max_iter"] + beyond
        self._beyond, self._unseen = beyond, unseen
        self._first = unseen - beyond + 1

    def in_16_bits(self, func: Func, start: State, dtype: torch.dtype) -> _Part:
        """Solve under autocast."""
        leaves = flatten(start)[0]
        evaluate = _Evaluations(func, under_autocast(func, leaves, dtype))
        settings = {**self._settings, "max_iter": self._settings["max_iter"] - 1}
        settings["rounding"] = torch.finfo(dtype).eps
        try:
            # Casts of parameters are kept until one leaves the outermost.
            with torch.autocast(leaves[0].device.type, dtype=dtype, enabled=False):
                found = self._solver(evaluate, start, **settings)
        finally:
            torch.clear_autocast_cache()  # made without autograd; the caller may have some with
        return _Part(found, evaluate.count - self._unseen)

    def to_the_end(self, func: Func, low: _Part) -> ForwardSolution:
        """Go on without autocast.

        Args:
            func: F.
            low: what `in_16_bits` returned.
        """
        state = low.solution.state
        left = self._evaluations - low.seen - self._unseen
        parts = []
        evaluate = _Evaluations(func, func)
        if self._unseen > 0:  # or the solver looks at where it begins
            image = func(state)
            parts.append(_Part(self._judged(state, image), 1))
            evaluate = _Evaluations(lambda state: image, func)
            if left < self._first + self._beyond or self._is_done(parts[0].solution):
                return self._joined(low, parts)
        found = self._solver(evaluate, state, **{**self._settings, "max_iter": left - self._beyond})
        parts.append(_Part(found, evaluate.count - self._unseen))
        return self._joined(low, parts)

    def _judged(self, state: State, image: State) -> ForwardSolution:
        """Return a state and its residual, as the solution of a solve with one evaluation."""
        packing = Packing(flatten(state)[0], self._settings["batch_dim"])
        h, f = (packing.pack(flatten(x)[0]) for x in (state, image))
        residual, size = (torch.linalg.vector_norm(x, dim=1) for x in (f - h, f))
        share = relative(residual, size)
        traces = [torch.stack((x, x), dim=1) for x in (residual, share)]
        first = torch.full_like(residual, self._first)
        return ForwardSolution(state, [], residual, share, traces[0], traces[1], first)

    def _is_done(self, found: ForwardSolution) -> bool:
        return bool((self._lowest(found) < self._settings["tol"]).all())

    def _lowest(self, found: ForwardSolution) -> Tensor:
        return found.rel_lowest if self._settings["stop_mode"] == "rel" else found.abs_lowest

    def _joined(self, low: _Part, parts: list[_Part]) -> ForwardSolution:
        """Return the best of what was found without autocast, with the traces of all."""
        before, best, seen = low.seen, None, [low, *parts]
        for part in parts:
            found = replace(part.solution, n_steps=part.solution.n_steps + before)
            best = found if best is None else self._better(best, found)
            before += part.seen
        assert best is not None
        lowest = torch.stack((best.abs_lowest, best.rel_lowest))
        first = seen[0].traces[:, :, :1]
        rest = lowest[:, :, None].expand(-1, -1, self._evaluations - self._unseen - before)
        traces = [part.traces[:, :, 1 : 1 + part.seen] for part in seen]
        absolute, share = torch.cat([first, *traces, rest], dim=2)
        sampled = [best.state] if self._samples else []
        return replace(best, sampled=sampled, abs_trace=absolute, rel_trace=share)

    def _better(self, old: ForwardSolution, new: ForwardSolution) -> ForwardSolution:
        """Return the better one of two solutions, sample by sample."""
        better = self._lowest(new) < self._lowest(old)
        (leaves, structure), (before, _) = flatten(new.state), flatten(old.state)
        packing = Packing(leaves, self._settings["batch_dim"])
        state = unflatten(chosen(better, leaves, before, packing.batch_dim), structure)
        numbers: dict[str, Any] = {
            name: torch.where(better, getattr(new, name), getattr(old, name))
            for name in ("abs_lowest", "rel_lowest", "n_steps")
        }
        return replace(new, state=state, **numbers)


@dataclass(frozen=True)
class _Part:
    """What a part of the solve found.

    Attributes:
        solution: what the solver returned.
        seen: the number of iterations whose residual the solver looked at, or could have.
    """

    solution: ForwardSolution
    seen: int

    @property
    def traces(self) -> Tensor:
        """Residuals, absolute and relative, shape (2, B, N + 1)."""
        return torch.stack((self.solution.abs_trace, self.solution.rel_trace))


class _Evaluations:
    """A map that is `first` in its first evaluation, and `func` in all others.

    Attributes:
        count: the number of evaluations so far.
    """

    def __init__(self, first: Func, func: Func) -> None:
        self.count = 0
        self._first, self._func = first, func

    def __call__(self, state: State) -> State:
        """Evaluate it."""
        return self._first(state) if self._begins() else self._func(state)

    @never_compiled  # the number changes in each call, which would compile each time
    def _begins(self) -> bool:
        self.count += 1
        return self.count == 1
