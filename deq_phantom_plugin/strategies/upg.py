"""UPG: the unrolling-based phantom gradient."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from .._plumbing.cached_weights import made_anew
from .._plumbing.transforms import in_torch_func
from ..adjoint import Linearization, Repeats
from ..contract.state import State, damped_step, flatten, unflatten
from ..contract.strategy import Context, GradStrategy
from .arguments import boolean, damping_factor
from .damping import damping
from .depth import Depth, drawn, number_or_depth
from .registry import register_strategy


@register_strategy("upg")
@dataclass(frozen=True, repr=False)
class UPG(GradStrategy):
    """Autograd through k damped steps h <- (1 - lam) h + lam F(h) from the detached h*.

    Source: Geng et al., "On Training Implicit Models" (NeurIPS 2021), supplement, algorithm 1. At
    an equilibrium the gradient is lam * sum_{t<k} v^T (lam J + (1 - lam) I)^t dF/dz, eq. A-14. The
    value is the k-th step.

    Costs k evaluations of F with their k backward passes. Memory holds k graphs. With `checkpoint`
    memory holds k states and, in backward, one graph at a time, for k more evaluations. (Inside
    `torch.func`, which has no checkpoints, memory holds k graphs all the same.)

    Args:
        k: the number of steps, or a distribution of it, see `Depth`.
        lam: the damping factor in (0, 1]; or "adaptive" for min(1, 1/rho(J)) (supplement 4.3),
            measured per sample, for one more evaluation of F and 10 vector-Jacobian products.
        checkpoint: whether backward makes the graph of each step again. F must then do the same
            each time, and a warning says so if it does not.

    Raises:
        ValueError: if an argument is out of range.
    """

    k: int | Depth | str = 5
    lam: float | str = 0.5
    checkpoint: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", number_or_depth("k", self.k))
        object.__setattr__(self, "lam", damping_factor(self.lam))
        boolean("checkpoint", self.checkpoint)

    @property
    def tells_samples_apart(self) -> bool:
        """Only if a radius is measured per sample."""
        return self.lam == "adaptive"

    @property
    def steps_ahead(self) -> int:
        """`k`, the steps."""
        return drawn("k", self.k)

    def resolve(self, context: Context) -> GradStrategy:
        """Return the strategy with the number of the current step, where that is drawn."""
        return replace(self, k=self.k.draw(context, "k")) if isinstance(self.k, Depth) else self

    def within(self, steps: int) -> UPG:
        """See `GradStrategy.within`."""
        return self if self.steps_ahead <= steps else replace(self, k=steps)

    def attach(self, func: Callable[[State], State], equilibrium: State, context: Context) -> State:
        """See `GradStrategy.attach`."""
        return deque(self.states(func, equilibrium, context), maxlen=1).pop()

    def states(
        self, func: Callable[[State], State], equilibrium: State, context: Context
    ) -> Iterator[State]:
        """Yield the k states h_1 ... h_k."""
        lam: float | list[Tensor]
        if isinstance(self.lam, str):
            lam = damping(Linearization(func, equilibrium, self), context.sample_dim)
        else:
            lam = self.lam
        state, repeats = equilibrium, Repeats(self)
        for number in range(self.steps_ahead):
            state = (
                _checkpointed(func, state, lam, partial(repeats.see, number))
                if self.checkpoint and not in_torch_func()  # which knows of no checkpoints
                else damped_step(func, state, lam)
            )
            yield state


def _checkpointed(
    func: Callable[[State], State],
    state: State,
    lam: float | list[Tensor],
    see: Callable[[Sequence[Tensor]], None],
) -> State:
    """Return the next state, whose graph backward makes. `see` gets the state both times."""
    leaves, structure = flatten(state)

    def step(*leaves: Tensor) -> list[Tensor]:
        with made_anew():
            found = flatten(damped_step(func, unflatten(list(leaves), structure), lam))[0]
        see(found)
        return found

    if torch.compiler.is_compiling():
        return unflatten(list(checkpoint(step, *leaves, use_reentrant=False)), structure)
    with set_checkpoint_early_stop(False):  # which would not come to the end of F
        return unflatten(list(checkpoint(step, *leaves, use_reentrant=False)), structure)
