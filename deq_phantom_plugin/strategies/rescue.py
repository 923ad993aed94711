"""What is done where an adjoint solve fails, as a policy says.

A fallback evaluates F again in backward. F must then be what it was in the forward pass, and there
it is not always: a variable that F reads may have another value, and `functional_call` has put the
module's own parameters back. So `Watched` notes what F used and returned in the forward pass, and
`Rescue` compares.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from .._plumbing.buffers import Buffers
from .._plumbing.compilation import eager, hooks_unsaid, never_compiled
from .._plumbing.lockstep import any_of
from .._plumbing.precision import AutocastState
from .._plumbing.trial import Trial
from ..adjoint import Packing, Repeats, Solution
from ..adjoint.probe import with_probe
from ..contract.state import State, flatten
from ..contract.strategy import Context
from .jfb import JFB

_PLAIN = (Tensor, nn.Parameter)  # the parameters of a sharded module come and go


class Watched:
    """F, which is the same map in backward as in the forward pass, or that is said.

    It notes the first evaluation under autograd: the parameters that modules in F held, and a
    sketch of what F returned. Code that is compiled with the whole model is not looked at.

    Args:
        func: F.
        equilibrium: h*, detached. Evaluations at other states are not compared.
        user: what evaluates F, such as a strategy. The warning and the error name it.
    """

    def __init__(self, func: Callable[[State], State], equilibrium: State, user: object) -> None:
        self._func = self.__wrapped__ = func
        self._leaves = flatten(equilibrium)[0]
        self._user = user
        self._repeats = Repeats(user)
        self._noted = False
        self._held: dict[tuple[nn.Module, str], list[Tensor]] = {}

    def __call__(self, state: State) -> State:
        """Evaluate F."""
        if torch.compiler.is_compiling() or self._noted or not torch.is_grad_enabled():
            return self._func(state)
        self._noted = True
        with _before_each_module(self._note):
            return self._compared(state)

    def again(self, state: State) -> State:
        """Evaluate F in backward, and leave no trace of that.

        Raises:
            RuntimeError: if a module in F has other parameters than in the forward pass.
        """
        with Trial(state), _before_each_module(self._check):
            return self._compared(state)

    def _compared(self, state: State) -> State:
        image = self._func(state)
        if _equal(flatten(state)[0], self._leaves):
            self._repeats.see(0, flatten(image)[0])
        return image

    def _note(self, module: nn.Module) -> None:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                self._held.setdefault((module, name), []).append(parameter)

    def _check(self, module: nn.Module) -> None:
        for name, now in module._parameters.items():
            held = self._held.get((module, name))
            # F itself may make parameters, as a hypernetwork does. They are tensors of a graph.
            if type(now) is not nn.Parameter or held is None:
                continue
            if not any(type(x) not in _PLAIN or _is_same(x, now) for x in held):
                raise RuntimeError(
                    f"{self._user!r}: func uses other parameters in backward than in the forward "
                    f"pass ({name} of {type(module).__name__}); it must do the same each time, "
                    "since the fallback evaluates it again. Under torch.func.functional_call take "
                    "a strategy that evaluates it in the forward pass only, such as upg, npg or "
                    "ift, or on_failure=\"fallback('jfb')\""
                )


@never_compiled  # which would have to make it anew behind every break of the graph
def watched(func: Callable[[State], State], equilibrium: State, user: object) -> Watched:
    """Return F as `Watched`; for the arguments see there."""
    return Watched(func, equilibrium, user)


@contextmanager
def _before_each_module(look: Callable[[nn.Module], None]) -> Iterator[None]:
    """Call `look` before each module that this thread runs inside a `with` block."""
    thread = threading.get_ident()

    def hook(module: nn.Module, args: Any) -> None:
        if threading.get_ident() == thread:
            look(module)

    handle = register_module_forward_pre_hook(hook)
    try:
        with hooks_unsaid():
            yield
    finally:
        handle.remove()


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two parameters are one, or share their memory."""
    if one is other:
        return True
    strided = one.layout is other.layout is torch.strided
    return strided and one.untyped_storage()._cdata == other.untyped_storage()._cdata


@torch.no_grad()
def _equal(leaves: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether two states are the same one. On the meta device, which has no numbers, none is."""
    pairs = zip(leaves, others, strict=True)
    return all(a.data_ptr() == b.data_ptr() or torch.equal(a, b) for a, b in pairs if not a.is_meta)


class Rescue:
    """Warns, raises, or gives the samples whose adjoint solve failed the g of another strategy.

    Args:
        func: F.
        equilibrium: h*, detached.
        context: what else is known. Its `on_failure` is the policy.
    """

    def __init__(
        self, func: Callable[[State], State], equilibrium: State, context: Context
    ) -> None:
        assert context.on_failure is not None
        self._policy = context.on_failure
        self._func, self._equilibrium, self._context = func, equilibrium, context
        self._autocast = AutocastState(flatten(equilibrium)[0])

    @property
    def goes_on(self) -> bool:
        """Whether the other samples go on where one becomes NaN."""
        return self._policy.action != "raise"

    def __call__(
        self, strategy: str, tol: float, v: list[Tensor], g: list[Tensor], solution: Solution
    ) -> list[Tensor]:
        """Return g, replaced as the policy says in the samples in which the solve failed.

        Args:
            strategy: the spec of the strategy that solved, for messages.
            tol: the relative residual that the solve aimed at.
            v: the leaves of the gradient that came in.
            g: the leaves of the g that the solve found.
            solution: what else the solve found.

        Raises:
            ConvergenceError: if a sample failed, and that is the policy.
        """
        tol = max(tol, self._policy.tol)
        failed = ~(solution.residual <= tol)
        if bool(failed.any()):
            message = f"{strategy}: the adjoint solve left a relative residual above {tol:.1e}"
            self._policy.note("adjoint", failed, self._context.memory, message)
        if self._policy.fallback is None or not any_of(bool(failed.any())):
            return g
        with self._autocast():
            other = self._fallback(v)
        masks = Packing(v, self._context.sample_dim).spread(failed)
        return [torch.where(mask.bool(), b, a) for mask, a, b in zip(masks, g, other, strict=True)]

    def _fallback(self, v: Sequence[Tensor]) -> list[Tensor]:
        """Return the g of the policy's strategy: (dF/dz)^T g is its gradient."""
        told = replace(self._context, on_failure=None, monitor=None)
        strategy = self._policy.fallback.resolve(told)
        if type(strategy) is JFB:  # needs no Jacobian, so that F may have changed
            return list(v)
        func = self._func.again if isinstance(self._func, Watched) else self._func
        buffers = Buffers()
        try:
            # A checkpoint inside F evaluates parts of it once more, behind the trial of `again`.
            # The random state is left to the strategy: npg_rr draws anew in each step.
            with eager(), buffers.noting(), torch.enable_grad():
                probed, probes = with_probe(func, self._equilibrium)
                attached = strategy.attach(probed, self._equilibrium, told)
                return list(torch.autograd.grad(flatten(attached)[0], probes, list(v)))
        finally:
            buffers.put_back()
