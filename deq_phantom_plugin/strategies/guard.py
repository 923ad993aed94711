"""Guard: another strategy, and what happens where a solve fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .._plumbing.compilation import never_compiled
from .._plumbing.lockstep import any_of
from .._plumbing.transforms import refuse_in_torch_func
from ..adjoint import Packing, relative_norm
from ..contract.failure import FailurePolicy
from ..contract.state import State, flatten, unflatten
from ..contract.strategy import Context, GradStrategy
from .arguments import positive_float
from .auto import Measuring
from .ift import IFT
from .registry import Spec, get_strategy, parse_spec, register_strategy
from .rescue import watched


@register_strategy("guard")
@dataclass(frozen=True, repr=False)
class Guard(GradStrategy):
    """A strategy with a policy for solves that fail: diverge, hit their limit, or give NaN.

    The forward solve has failed in a sample if ||F(h) - h|| > forward_tol ||F(h)||; the adjoint
    solve of `ift` if ||v - (I - J^T) g|| > adjoint_tol ||v||; either if it is not finite. Then

    - "warn" goes on with what there is, and says so once a run;
    - "raise" raises `ConvergenceError`, forward or in backward;
    - "fallback('jfb')", or any other spec, gives these samples that strategy's gradient. States
      that are not finite begin again at the initial state. Where the adjoint solve has failed, a
      fallback other than jfb evaluates F again in backward, and leaves no trace of that. F must
      then do the same as in the forward pass, and a warning or an error says so if it does not.

    `dpp.failures(model)` counts the samples. Costs one evaluation of F more than the strategy, and
    the host waits for the device once a forward pass. A strategy that owns its solve is left as it
    is: its gradient is that of what it computed.

    Args:
        grad: the strategy's spec.
        on_failure: "warn", "raise", or "fallback(SPEC)".
        forward_tol: the relative residual that the forward solve may leave.
        adjoint_tol: the relative residual that the adjoint solve may leave; a solver's own `tol`
            if that is larger.

    Raises:
        ValueError: if an argument is out of range, or a spec invalid.
        RuntimeError: in `attach`, inside a transform of `torch.func`; in backward, if a fallback
            finds other parameters in F than the forward pass (`torch.func.functional_call`).
    """

    grad: Spec = "ift"
    on_failure: str = "warn"
    forward_tol: float = 0.1
    adjoint_tol: float = 0.1
    _policy: FailurePolicy = field(init=False, compare=False)

    def __post_init__(self) -> None:
        inner = get_strategy(self.grad)
        object.__setattr__(self, "grad", inner)
        for name in ("forward_tol", "adjoint_tol"):
            object.__setattr__(self, name, positive_float(name, getattr(self, name)))
        action, fallback = _parsed(self.on_failure)
        if fallback is not None:
            if fallback.owns_solve:
                raise ValueError(
                    f"on_failure={self.on_failure!r}: {fallback!r} owns its solve, so it cannot go "
                    "on from the state of another; expected a strategy such as jfb, npg or upg"
                )
            object.__setattr__(self, "on_failure", f"fallback({repr(fallback)!r})")
        object.__setattr__(self, "_policy", FailurePolicy(action, fallback, self.adjoint_tol))

    @property
    def _strategy(self) -> GradStrategy:
        assert isinstance(self.grad, GradStrategy)
        return self.grad

    @property
    def _both(self) -> list[GradStrategy]:
        fallback = self._policy.fallback
        return [self._strategy] if fallback is None else [self._strategy, fallback]

    def resolve(self, context: Context) -> GradStrategy:
        """Return the guard of the strategy of the current step, or that itself if it solves."""
        inner = self._strategy.resolve(context)
        if inner.owns_solve:
            return inner
        return self if inner is self.grad else replace(self, grad=inner)

    @property
    def wants_inverse_jacobian(self) -> bool:
        """Whether the strategy inside does, or the fallback."""
        return any(strategy.wants_inverse_jacobian for strategy in self._both)

    @property
    def needs_inverse_jacobian(self) -> bool:
        """Whether the strategy inside does, or the fallback."""
        return any(strategy.needs_inverse_jacobian for strategy in self._both)

    @property
    def accepts_nonfinite(self) -> bool:
        """Whether a fallback has samples that are not finite begin again."""
        return self._policy.fallback is not None

    @property
    def assumes_equilibrium(self) -> bool:
        """No: the guard looks at the residual of each sample."""
        return False

    @property
    def exchanges(self) -> bool:
        """Whether the strategy inside does."""
        return self._strategy.exchanges

    @property
    def _solves_in_backward(self) -> bool:
        """Whether a fallback may be evaluated in backward, where F has to be what it was."""
        return self._policy.fallback is not None and isinstance(self._strategy, (IFT, Measuring))

    def within(self, steps: int) -> GradStrategy:
        """Return the guard of the strategy inside, for a loop of so many evaluations."""
        inner = self._strategy.within(steps)
        return self if inner is self.grad else replace(self, grad=inner)

    @property
    def steps_ahead(self) -> int:
        """That of the strategy inside."""
        return self._strategy.steps_ahead

    def attach(self, func: Callable[[State], State], equilibrium: State, context: Context) -> State:
        """See `GradStrategy.attach`."""
        refuse_in_torch_func(self)  # where nobody can look at a residual
        policy = self._policy
        packing = Packing(flatten(equilibrium)[0], context.sample_dim)
        equilibrium = _finite(equilibrium, packing, context)
        failed = _residual(func, equilibrium, packing) > self.forward_tol
        told = replace(context, on_failure=policy)
        watching = watched(func, equilibrium, self) if self._solves_in_backward else func
        any_failed = _is_true(failed.any())
        if any_failed:
            message = f"the forward solve left a relative residual above {self.forward_tol}"
            policy.note("forward", failed, context.memory, message)
        # Where F communicates a fallback is evaluated in all processes, or in none.
        if policy.fallback is None or not any_of(any_failed):
            return self._strategy.attach(watching, equilibrium, told)
        fallback = policy.fallback.resolve(context).attach(func, equilibrium, context)
        # Where processes wait for one another, as where `auto` measures, one without a good sample
        # takes part, with a gradient of zero.
        if not any_of(not _is_true(failed.all())) and not self._strategy.exchanges:
            return fallback
        attached, structure = flatten(self._strategy.attach(watching, equilibrium, told))
        chosen = [
            torch.where(mask.bool(), b, a)
            for mask, a, b in zip(
                packing.spread(failed), attached, flatten(fallback)[0], strict=True
            )
        ]
        return unflatten(chosen, structure)

    def __repr__(self) -> str:
        return (
            f"{self.name}({repr(self.grad)!r}, on_failure={self.on_failure!r}, "
            f"forward_tol={self.forward_tol!r}, adjoint_tol={self.adjoint_tol!r})"
        )


def _parsed(on_failure: object) -> tuple[str, GradStrategy | None]:
    expected = "expected 'warn', 'raise', or a fallback such as \"fallback('jfb')\""
    if on_failure in ("warn", "raise"):
        return str(on_failure), None
    if not isinstance(on_failure, str):
        raise ValueError(f"on_failure={on_failure!r}; {expected}")
    try:
        action, args, kwargs = parse_spec(on_failure)
    except ValueError as error:
        raise ValueError(f"on_failure={on_failure!r}; {expected} ({error})") from None
    if action != "fallback" or kwargs or len(args) != 1:
        raise ValueError(f"on_failure={on_failure!r}; {expected}")
    return action, get_strategy(args[0])


@never_compiled  # which would say aloud that it cannot look at numbers
def _is_true(value: Tensor) -> bool:
    return bool(value)


@torch.no_grad()
def _residual(func: Callable[[State], State], equilibrium: State, packing: Packing) -> Tensor:
    """Return ||F(h) - h|| / ||F(h)|| of each sample, shape (B,); infinite where it is NaN."""
    h, image = (packing.pack(flatten(s)[0]) for s in (equilibrium, func(equilibrium)))
    return torch.nan_to_num(relative_norm(image - h, image), nan=torch.inf)


def _finite(equilibrium: State, packing: Packing, context: Context) -> State:
    """Return the state, with samples that are not finite at the initial state, or at zero."""
    leaves, structure = flatten(equilibrium)
    broken = ~torch.isfinite(packing.pack(leaves)).all(dim=1)
    if not _is_true(broken.any()):
        return equilibrium
    starts = [torch.zeros_like(leaf) for leaf in leaves]
    if context.initial_state is not None:
        given = [leaf.detach() for leaf in flatten(context.initial_state)[0]]
        starts = [torch.nan_to_num(leaf, nan=0.0, posinf=0.0, neginf=0.0) for leaf in given]
    chosen = [
        torch.where(mask.bool(), start, leaf)
        for mask, start, leaf in zip(packing.spread(broken), starts, leaves, strict=True)
    ]
    return unflatten(chosen, structure)
