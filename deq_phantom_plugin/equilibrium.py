"""Equilibrium: a solve of your own as a module, with its solver and gradient chosen by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ._plumbing.cached_weights import made_anew
from ._plumbing.calls import Calls, Counted
from ._plumbing.compilation import check_compile, compiled, never_compiled
from ._plumbing.hints import hint
from ._plumbing.lockstep import active, evaluated, in_lockstep, in_turn, part
from ._plumbing.trial import Trial
from ._plumbing.whole import Sharded
from .attach import count
from .contract.state import CheckedFunc, State, check_equilibrium, check_like, flatten
from .contract.strategy import BatchDim, Context, GradStrategy
from .forward import (
    ForwardSolution,
    Judge,
    LastSolve,
    anderson,
    broyden,
    check_solve_dtype,
    fixed_point,
)
from .forward.warm_start import Samples, starts_of
from .hosts.attaching import Attaching
from .hosts.evaluation import attaches, watched
from .hosts.settings import fitting
from .hosts.solve import relative_residual
from .inspection import FAR, settled
from .loop import At, evaluations, repeated
from .strategies.arguments import nonnegative_float, positive_int
from .strategies.depth import Depth, number_or_depth
from .strategies.registry import Spec, get_strategy

SOLVERS: Mapping[str, Callable[..., ForwardSolution]] = MappingProxyType(
    {"anderson": anderson, "broyden": broyden, "fixed_point": fixed_point}
)

Solver = str | Callable[[Callable[[State], State], State], Any]


class Equilibrium(Attaching):
    """Solve h = F(h) without a graph, and attach the named gradient.

        self.equilibrium = dpp.Equilibrium(grad="npg(k=9)", tol=1e-4)  # in a model
        h = self.equilibrium(func, h0)  # in its forward

    It is a module without parameters. `dpp.set_grad`, `dpp.set_step`, `dpp.monitor` and
    `dpp.model_report` find it in the model. In the `state_dict` it has one number, the step.

    A strategy that owns the solve (bptt, reversible) begins at h0, and no other solve is made. In
    evaluation mode, and under `torch.no_grad`, the equilibrium carries no gradient.

    Args:
        solver: "anderson", "broyden" or "fixed_point", those of `deq_phantom_plugin.forward`; or a
            function (func, start) -> state of your own. It is called without autograd, and may
            also return a `ForwardSolution`.
        grad: the gradient, a spec of `get_strategy`. `shine` needs `solver="broyden"`.
        max_iter: the largest number of iterations, 50 by default; a function has its own.
        tol: the relative residual to reach in every sample, 1e-3 by default. A function has its
            own. If you give a `tol` too, the function's result is judged by it.
        batch_dim: see `Context.batch_dim`. Where samples are coupled the batch is solved as one.
            By default that is found out at the first equilibrium in training.
        grad_in_eval: whether the gradient is attached in evaluation mode too, for forces, saliency
            maps and attacks.
        steps: the number of evaluations of a loop in place of a solver, as in recursive models, see
            `dpp.loop`; or a distribution of it, see `Depth`, of which evaluation mode takes the
            mean. A loop looks at no residual.
        compile: whether F is compiled, or a mode of `torch.compile`. The solve runs compiled, and
            so do strategies that go through a graph once (`upg`, `tbptt`, `jfb`, `bptt`). Others
            run F as it was written, see docs/howto/compile.md.
        solve_dtype: "bfloat16" or "float16" for evaluations under autocast, all but the last ones.
            Residual and gradient are F's own. It goes with a solver by name, see
            docs/howto/solvers.md.
        process_group: see `Context.process_group`.
        warm_start: "sample" for solves in training that begin at the latest equilibrium of the same
            samples. Each call is then told their numbers, see `dpp.SampleStarts` and
            docs/howto/solvers.md.

    Attributes:
        grad: the strategy; `dpp.set_grad` replaces it.
        memory: what the strategy keeps between steps, see `Memory`.
        steps: as it was given. A strategy that owns the solve keeps the number that it had when it
            was named. If you change `steps`, name the strategy again.
        starts: what `warm_start` keeps, None without it; not saved, copied or pickled.
        last: the last solve, None before the first. It is not saved, copied or pickled. Where the
            solver does not tell the residual (a strategy that owns the solve, a function that
            returns a state), one more evaluation does, which leaves no trace.

    Warns:
        ConvergenceWarning: once, if a solve stopped above `tol`.
        AssumptionWarning: once, if samples turn out to be coupled, or F is not the same map each
            time; or if it is in evaluation mode where a gradient may be expected.

    Raises:
        ValueError: if an argument is out of range. The message says what is accepted.
    """

    steps: int | Depth | None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "steps":
            if value is None and self.__dict__.get("steps") is not None:
                raise ValueError(
                    "steps=None: this Equilibrium was made as a loop, and has no solver; expected "
                    "a number or a distribution, or make another Equilibrium"
                )
            value = None if value is None else number_or_depth("steps", value)
        super().__setattr__(name, value)

    def __init__(
        self,
        solver: Solver = "anderson",
        grad: Spec = "upg",
        *,
        max_iter: int | None = None,
        tol: float | None = None,
        batch_dim: BatchDim = "auto",
        grad_in_eval: bool = False,
        steps: int | str | None = None,
        compile: bool | str = False,
        solve_dtype: str | torch.dtype | None = None,
        process_group: Any = "auto",
        warm_start: str | None = None,
    ) -> None:
        self.__dict__["steps"] = None if steps is None else number_or_depth("steps", steps)
        self.__dict__["solver"] = solver  # on which it depends whether a `grad` fits
        super().__init__(grad, batch_dim, grad_in_eval, process_group)
        self.solver, self.max_iter, self.tol = solver, max_iter, tol
        self.compiles = check_compile(compile)  # `compile` is a method of modules
        check_solve_dtype(solve_dtype)
        self.solve_dtype = solve_dtype
        self.starts = starts_of(warm_start)
        of_solver = {
            "max_iter": max_iter,
            "tol": tol,
            "solve_dtype": solve_dtype,
            "warm_start": warm_start,
        }
        if steps is not None:
            for name, value in of_solver.items():
                if value is not None or solver != "anderson":
                    raise ValueError(
                        f"steps={steps!r} beside solver={solver!r}, {name}={value!r}: steps makes "
                        f"a loop, which has no solver and no {name}; give steps, or the others"
                    )
        elif callable(solver):
            for name in ("max_iter", "solve_dtype"):
                if of_solver[name] is not None:
                    raise ValueError(
                        f"{name}={of_solver[name]!r} beside a function as solver, which decides "
                        f"that by itself; {name} goes with {', '.join(SOLVERS)}"
                    )
        elif solver in SOLVERS:
            self.max_iter = positive_int("max_iter", 50 if max_iter is None else max_iter)
            self.tol = 1e-3 if tol is None else tol
            if solver == "anderson" and self.max_iter < 3:
                raise ValueError(f"max_iter={max_iter!r}; expected at least 3 for anderson")
        else:
            raise ValueError(
                f"solver={solver!r}{hint(solver, SOLVERS)}; expected one of {', '.join(SOLVERS)}, "
                "or a function (func, start) -> state"
            )
        if tol is not None:
            nonnegative_float("tol", tol)
        self.last: LastSolve | None = None
        self._judge = Judge()
        self._own: Tensor | None = None  # residual of a strategy that owns the solve

    def strategy_of(self, spec: Spec) -> GradStrategy:
        """Return the strategy that a spec names here: one that owns a loop takes its steps."""
        strategy = get_strategy(spec, None if self.steps is None else {"steps": self.steps})
        if self.steps is not None or self.solver in ("anderson", "fixed_point"):
            fitting(strategy, f"solver={self.solver!r}" if self.steps is None else "a loop")
        return strategy

    def forward(
        self, func: Callable[[State], State], start: State, samples: Samples | None = None
    ) -> State:
        """Return the equilibrium, in a state like the initial one.

        Args:
            func: F, from a state to a state of the same structure, shapes and dtypes; see
                `dpp.attach`.
            start: where the solve begins, h0: a tensor, or any nesting of tuples, lists and dicts
                of tensors. Only a strategy that owns the solve sends a gradient to it.
            samples: the number of each sample in the data set, shape (B,), for `warm_start`; not
                looked at without it, or in evaluation mode.

        Raises:
            ValueError: if `start` is no state, or `func` or the solver returns something else; in
                training also if what the solver returns is not finite, and with `warm_start` if
                `samples` are missing, or the strategy owns the solve.
        """
        if self.starts is None or not self.training:
            return self._found(func, start)
        if (owner := self.solving(self.context(start))) is not None:
            raise ValueError(
                f"warm_start='sample' with {owner!r}, which is the gradient of its own steps from "
                "the initial state; take a strategy that begins at an equilibrium, such as upg"
            )
        found = self._found(func, self.starts.begin(samples, start))
        self.starts.keep(samples, found)
        return found

    def _found(self, func: Callable[[State], State], start: State) -> State:
        """Do what `forward` does, from this start."""
        func, begin = compiled(func, self.compiles), tree_map(_detached, start)
        check_equilibrium(begin, finite=False)
        if self.steps is not None:
            return self._loop(func, start)
        if (sharded := Sharded.of(start)) is not None:
            func, begin = sharded.on_whole(func), sharded.whole(begin)
            start = sharded.whole(start)
        with in_lockstep(self.process_group, () if sharded is None else sharded.holders):
            found = self._solved(func, begin, start)
        return found if sharded is None else sharded.parts(found)

    def _solved(self, func: Callable[[State], State], begin: State, start: State) -> State:
        """Do what `forward` does, without a loop.

        Args:
            func: F.
            begin: where the solve begins, detached.
            start: the same as it was given.
        """
        context, counted = self.context(start), Counted(func)
        if self.solving(context) is not None:
            attached = self.attached(counted, begin, context, 0)
            self._note(func, tree_map(_detached, attached), None, counted.calls, context)
            return attached
        if self._own is not None and self.grad.resolve(context).owns_solve:
            self._judge.judge_another(self._own, self.tol, self.grad, self.solver)
        in_solve: Callable[[State], State] = watched(self, counted)
        # Tensors of inference mode do not count their changes.
        in_inference = torch.is_inference_mode_enabled()
        in_solve = in_turn(in_solve) if in_inference else CheckedFunc(in_solve, begin)
        if callable(self.solver):
            found, residual, context = self._by_function(in_solve, begin, context)
        else:
            found, residual, context = self._by_name(func, in_solve, begin, context)
        nfe = self._note(func, found, residual, counted.calls, context)
        if not attaches(self):
            return found
        return self.attached(func, found, context, nfe, residual)

    def _loop(self, func: Callable[[State], State], start: State) -> State:
        """Return the state after a loop; see `dpp.loop`."""
        steps = self._number(start)
        self.last = LastSolve(None, torch.tensor(steps))
        if attaches(self):
            return self.looped(func, start, steps)
        if self.training:
            count(self.context(start))  # of which nobody else hears
        return self._plain(func, start, steps)

    def _plain(
        self, func: Callable[[State], State], start: State, steps: int, at: At | None = None
    ) -> State:
        """Return the state after a loop that carries no gradient; see `looped` for `at`."""
        evaluate = evaluations(watched(self, func), at and watched(self, at))
        with torch.no_grad():
            return repeated(evaluate, tree_map(_detached, start), steps)

    def _number(self, start: State) -> int:
        """Return the evaluations of a loop."""
        if isinstance(self.steps, Depth):
            return self.steps.draw(self.context(start))
        assert self.steps is not None
        return self.steps

    def _by_function(
        self, func: Callable[[State], State], begin: State, context: Context
    ) -> tuple[State, Tensor | None, Context]:
        """Return what the caller's solver found, its residual if it tells, and the context."""
        solver: Any = self.solver
        with torch.no_grad():
            result = solver(func, begin)
        residual = None
        if isinstance(result, ForwardSolution):
            context = replace(context, solver_result=result)
            result, residual = result.state, result.rel_lowest
        check_like(solver, result, begin)
        return tree_map(_detached, result), residual, context

    def _by_name(
        self,
        func: Callable[[State], State],
        in_solve: Callable[[State], State],
        begin: State,
        context: Context,
    ) -> tuple[State, Tensor | None, Context]:
        """Return what a solver of ours found, the residual, and the context with what is known."""
        leaves = flatten(begin)[0]
        if all(leaf.numel() == 0 for leaf in leaves):
            if (around := active()) is not None:  # others have samples
                around.look(in_solve, begin)
            return begin, leaves[0].abs().new_zeros(0), context
        solution = self._solution(in_solve, begin, context, self._samples())
        if attaches(self):
            with part():
                if self._may_ask(solution):
                    # At the equilibrium: where the solve begins, J may be zero.
                    checked, judged = CheckedFunc(func, begin), self._judges(context)
                    context = settled(context, checked, solution.state, judged=judged)
            if context.batch_dim is None and solution.rel_lowest.numel() > 1:
                solution = self._solution(in_solve, begin, context, None)
        context = replace(context, solver_result=solution)
        return tree_map(_detached, solution.state), solution.rel_lowest.detach(), context

    @never_compiled  # for the sake of its length, which changes; an F compiled by itself stays so
    def _solution(
        self,
        func: Callable[[State], State],
        begin: State,
        context: Context,
        batch_dim: int | None,
    ) -> ForwardSolution:
        options: dict[str, Any] = {}
        if self.solver == "broyden" and attaches(self):
            options["keep_inverse"] = self.grad.resolve(context).wants_inverse_jacobian
        return SOLVERS[str(self.solver)](
            func,
            begin,
            batch_dim=batch_dim,
            max_iter=self.max_iter,
            tol=self.tol,
            stop_mode="rel",
            solve_dtype=self.solve_dtype,
            **options,
        )

    @never_compiled
    def _samples(self) -> int | None:
        """Return the dimension to solve along: as was said, or has been found out so far."""
        if not isinstance(self.batch_dim, str):
            return self.batch_dim
        return None if any(found.coupled for found in list(self.memory.findings.values())) else 0

    @never_compiled
    def _judges(self, context: Context) -> bool:
        """Whether `tol` says it where h is no equilibrium, or the gradient takes h for none."""
        return 0 < (self.tol or 0) <= FAR or not self.grad.resolve(context).assumes_equilibrium

    @never_compiled
    def _may_ask(self, solution: ForwardSolution) -> bool:
        """Whether what was found is a state to ask at; looked at until something is known."""
        return bool(self.memory.findings) or bool(torch.isfinite(solution.rel_lowest).all())

    @never_compiled
    def _note(
        self,
        func: Callable[[State], State],
        found: State,
        residual: Tensor | None,
        calls: Calls,
        context: Context,
    ) -> int:
        """Keep what the solve reached and took; return its evaluations."""
        nfe = calls.of_solve()
        judged = self.solving(context) is None
        if residual is None:
            with torch.no_grad(), Trial(found), made_anew():
                image = evaluated(func, found)
                residual = relative_residual(found, image, context.batch_dim)
        self.last = LastSolve(residual, nfe)
        self._own = None if judged else residual
        if judged and self.tol and residual.numel() and not Trial.depth():
            self._judge.judge(residual, self.tol, self.max_iter)
        return int(nfe)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "last": None, "_judge": Judge(), "_own": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        new = dict.fromkeys(("steps", "solve_dtype", "starts"))  # old pickles lack them
        new["compiles"] = False
        super().__setstate__({**new, **state})

    def extra_repr(self) -> str:
        """Show the settings."""
        settings = ("max_iter", "tol", "batch_dim", "grad_in_eval", "steps", "solve_dtype")
        shown = [f"{name}={getattr(self, name)!r}" for name in settings]
        shown.append(f"compile={self.compiles!r}")
        shown += [] if self.starts is None else ["warm_start='sample'"]
        return ", ".join([f"solver={self.solver!r}", f"grad={self.grad!r}", *shown])


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf
