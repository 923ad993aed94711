"""Reversible: the gradient of an iteration that is run backwards instead of being stored."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .._plumbing.cached_weights import made_anew
from .._plumbing.compilation import never_compiled
from .._plumbing.once import warn_once
from .._plumbing.precision import AutocastState
from .._plumbing.transforms import refuse_in_torch_func
from ..contract.errors import AssumptionWarning, ConvergenceWarning, NonFiniteError
from ..contract.state import State, flatten, unflatten
from ..contract.strategy import Context, GradStrategy
from .arguments import relaxation
from .depth import Depth, drawn, number_or_depth
from .drift import Drift
from .registry import register_strategy
from .replay import Replay

_TOLERANCE = 1e-2  # the relative error of the gradient above which a warning is given
_ADVICE = "F must be deterministic; take fewer steps, a beta nearer to 0.5, or F in float64"
_STRETCHES = 3  # parts of the way back, each from a pair of states that was kept


@register_strategy("reversible")
@dataclass(frozen=True, repr=False)
class Reversible(GradStrategy):
    """Backprop through a coupled iteration whose states backward recovers from the last two.

    Source: McCallum, Arora & Foster 2025, "Reversible Deep Equilibrium Models" (arXiv:2509.12917).
    From y = z = the initial state, the forward pass does `steps` times

        y <- (1 - beta) y + beta F(z),    z <- (1 - beta) z + beta F(y).

    Each update can be solved for the old value, so backward recovers the states and does not store
    them. The strategy owns the solve, as bptt does. The value is the last z. The gradient is that
    of the iterates themselves, and can be differentiated to any order.

    Costs 2 * steps evaluations of F and, in backward, as many again with their backward passes.
    Memory holds the start, three pairs of states in float64, one evaluation's graph at a time, and
    per evaluation eight numbers per leaf and the buffers of F that it updates. The pairs are those
    at the end, and after one and two thirds of the evaluations. From each, backward starts anew.

    F must do the same each time: dropout masks are fixed during a solve. Buffers that F updates
    are given back to it as each evaluation found them, and are left as the forward pass left them.
    An F that was compiled runs as it was written.

    Running backwards multiplies rounding errors, which is why y and z are in float64 whatever F
    computes in. The bound, step by step:

    1. Let w_n be the states in the order in which they are made (y_1, z_1, y_2, ...). Backward
       recovers w_(n-2) = (w_n - beta F(w_(n-1))) / (1 - beta).
    2. Let e_n be the error of the recovered w_n, and L the Lipschitz constant of F. Then

        |e_(n-2)|  <=  a |e_n| + c |e_(n-1)| + rho,   a = 1 / |1 - beta|,   c = L beta / |1 - beta|.

    3. Here rho = a (8 eps + 2 beta (L eta + phi)) max_n |w_n| is the rounding of one step:
       eps = 1.1e-16 rounds float64; eta rounds F's input to F's own dtype (0 for float64); phi is
       the rounding inside F, relative to max |w|.
    4. After k evaluations from a pair that was kept, by induction,

        |e|  <=  rho (r^k - 1) / (r - 1),   r = (c + sqrt(c^2 + 4 a)) / 2,

       since r^2 = c r + a and r <= a + c. F(h) = -L h attains the growth for beta < 1.

    In float32 errors are often far below the bound: where F's input is rounded to the very number
    of the forward pass, F repeats itself. A contraction has L <= 1. At L = 1 and beta < 1,
    r = 1 / |1 - beta|:

        beta                                 0.3   0.5   0.7   0.8   0.9   1.2   1.5
        r at L = 1                           1.4   2.0   3.3   5.0   10.0  6.7   3.6
        steps until 1e-15 has grown to 1e-4  106   54    31    23    16    19    29

    States that are off by 1e-4 cost a gradient about 1e-4 where F is smooth, and up to percents
    where F has kinks; less, where its cotangents have faded on their way. Normalisation at small
    states has large Lipschitz constants, and allows for fewer steps. What really happens is found
    out: backward compares the states that it recovers with those of the forward pass (see `Drift`).
    An estimated error of the gradient above 1e-2 warns once per run.

    Args:
        steps: the number of iterations, or a distribution of it, see `Depth`.
        beta: the relaxation factor, in (0, 1) or (1, 2). The nearer it is to 1, the faster states
            are forgotten, and the fewer steps can be undone.

    Raises:
        ValueError: if an argument is out of range.
        RuntimeError: inside a transform of `torch.func`, and in backward under `torch.vmap`.
        NonFiniteError: in backward, if the iteration or its way back makes a NaN or an infinity.
    """

    steps: int | Depth | str = 10
    beta: float = 0.8

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", number_or_depth("steps", self.steps))
        object.__setattr__(self, "beta", relaxation(self.beta))

    @property
    def owns_solve(self) -> bool:
        """Yes."""
        return True

    @property
    def tells_samples_apart(self) -> bool:
        """No."""
        return False

    def resolve(self, context: Context) -> GradStrategy:
        """Return the strategy with the number of the current step, where that is drawn."""
        depth = self.steps
        return replace(self, steps=depth.draw(context)) if isinstance(depth, Depth) else self

    def attach(self, func: Callable[[State], State], equilibrium: State, context: Context) -> State:
        """See `GradStrategy.attach`."""
        return deque(self.states(func, equilibrium, context), maxlen=1).pop()

    def states(
        self, func: Callable[[State], State], equilibrium: State, context: Context
    ) -> Iterator[State]:
        """Yield the iterates z_1 ... z_steps."""
        refuse_in_torch_func(self)
        start = equilibrium if context.initial_state is None else context.initial_state
        tape = _Tape(self, func, start)
        y = z = tape.widened(start)
        for _ in range(drawn("steps", self.steps)):
            y = tape.update(y, z)
            z = tape.update(z, y)
            yield tape.narrowed(z)


class _Key(NamedTuple):
    """What autograd saves in place of a tensor.

    Attributes:
        number: the number of the evaluation, from 1.
        place: the position of the tensor among those that this evaluation saves.
        version: the version of the tensor when it was saved.
        address: what tells its memory apart.
    """

    number: int
    place: int
    version: int
    address: int


class _Iterate(NamedTuple):
    """y or z.

    Attributes:
        leaves: its leaves, in float64.
        sketch: a projection of them, see `Sketch`.
    """

    leaves: list[Tensor]
    sketch: Tensor

    def detach(self) -> _Iterate:
        """Return it without its graph."""
        return _Iterate([leaf.detach() for leaf in self.leaves], self.sketch)


_Pair = tuple[_Iterate, _Iterate]
"""The state that F was given in an evaluation, and the state that was made from its image."""


class _Saved(NamedTuple):
    """A tensor that autograd saves in an evaluation.

    Attributes:
        tensor: the tensor, detached.
        is_parameter: whether it is a parameter, or a view of one. Its memory is then the same in
            each evaluation.
    """

    tensor: Tensor
    is_parameter: bool


def _address(tensor: Tensor) -> int:
    """Return what tells a tensor's memory apart, also where memory is freed and used again."""
    with contextlib.suppress(RuntimeError):  # a tangent that stands for zeros has no memory
        return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else 0
    return 0


class _Tape:
    """What autograd saves along the iteration, made again when backward asks for it.

    Autograd builds the graph of all evaluations, so nobody has to know what F captures. But where
    a node would save a tensor, it saves a `_Key`. When backward asks for a tensor of evaluation n,
    the tape runs the iteration back to n, which evaluates F once more.

    Args:
        strategy: the strategy whose iteration this is.
        func: the map F.
        start: the state to begin at.
    """

    def __init__(self, strategy: Reversible, func: Callable[[State], State], start: State) -> None:
        self._strategy, self._func = strategy, func
        leaves, self._structure = flatten(start)
        self._dtypes = [leaf.dtype for leaf in leaves]
        self._autocast = AutocastState(leaves)
        self._requires_grad: list[list[bool]] = []  # of F's input in each evaluation
        self._saved: list[_Saved] = []  # what autograd saves in evaluation `_number`
        # States are held detached: graphs hold the tape, and must not hold themselves through it.
        self._start = [leaf.detach().clone() for leaf in leaves]
        self._drift = Drift([leaf.to(_wide(leaf)) for leaf in self._start], strategy.beta)
        self._replay = Replay()
        # Evaluations whose input and result are kept.
        steps = drawn("steps", strategy.steps)
        stops = (round(2 * steps * i / _STRETCHES) for i in range(1, _STRETCHES))
        self._kept: dict[int, _Pair | None] = dict.fromkeys(stops)
        self._end: _Pair | None = None
        self._lock = threading.RLock()  # threads may go back through one graph at once
        self._restart()

    def widened(self, state: State) -> _Iterate:
        """Return a state in the form and dtype that y and z have."""
        leaves = [leaf.to(_wide(leaf), copy=True) for leaf in flatten(state)[0]]
        return _Iterate(leaves, self._drift.true(0))

    def narrowed(self, iterate: _Iterate) -> State:
        """Return y or z as a state of the initial state's dtypes, in tensors of its own."""
        narrow = [
            leaf.to(dtype, copy=True)
            for leaf, dtype in zip(iterate.leaves, self._dtypes, strict=True)
        ]
        return unflatten(narrow, self._structure)

    @never_compiled
    def update(self, old: _Iterate, other: _Iterate) -> _Iterate:
        """Return (1 - beta) old + beta F(other)."""
        beta = self._strategy.beta
        self._requires_grad.append([leaf.requires_grad for leaf in other.leaves])
        number = len(self._requires_grad)
        with self._replay.next():
            image = self._evaluate(number, other.leaves)
        leaves = []
        for leaf, f in zip(old.leaves, image, strict=True):
            if f.requires_grad:
                # F may return a tensor of the user's, such as a parameter. A hook on that would
                # stay, with the whole tape, and would see cotangents from elsewhere.
                f = f.view_as(f)
                f.register_hook(functools.partial(self._weigh, number))
            # beta F is rounded by itself, as on the way back: a zero then comes back as a zero.
            leaves.append(torch.add(beta * f.to(leaf.dtype), leaf, alpha=1 - beta))
        new = _Iterate(leaves, self._drift.keep(leaves))
        self._end = (other.detach(), new.detach())
        if number in self._kept:
            self._kept[number] = self._end
        self._restart()
        return new

    def _weigh(self, number: int, cotangent: Tensor | None) -> None:
        refuse_in_torch_func(self._strategy)  # is_grads_batched=True
        self._drift.weigh(number, cotangent)

    def _evaluate(self, number: int, leaves: list[Tensor]) -> list[Tensor]:
        """Return F's leaves. The tensors that it saves stay in `_saved` until the tape moves on."""
        self._saved.clear()  # the graph holds `pack`, and through it the list
        self._number, self._saved = number, (saved := [])

        def pack(tensor: Tensor) -> _Key:
            base = tensor if tensor._base is None else tensor._base
            saved.append(_Saved(tensor.detach(), isinstance(base, torch.nn.Parameter)))
            return _Key(number, len(saved) - 1, tensor._version, _address(tensor))

        narrow = [leaf.to(dtype) for leaf, dtype in zip(leaves, self._dtypes, strict=True)]
        with saved_tensors_hooks(pack, self._unpack), made_anew():
            return flatten(self._func(unflatten(narrow, self._structure)))[0]

    def _unpack(self, key: _Key) -> Tensor:
        refuse_in_torch_func(self._strategy)
        with self._lock:
            return self._found(key)

    def _found(self, key: _Key) -> Tensor:
        number, place, version, address = key
        if number > self._number:  # a second backward pass begins at the end again
            self._restart()
        while number < self._number:
            self._step_back()
        if place >= len(self._saved):
            raise RuntimeError(
                f"{self._strategy!r}: func did something else when it was evaluated again in "
                "backward: it saved fewer tensors. It must do the same each time, or the gradient "
                "is wrong. Take out of func what depends on the call, or take bptt"
            )
        tensor, is_parameter = self._saved[place]
        if is_parameter and _address(tensor) != address:
            raise RuntimeError(
                f"{self._strategy!r}: func uses other parameters in backward than in the forward "
                "pass; it must do the same each time. Under torch.func.functional_call take a "
                "strategy that evaluates it in the forward pass only, such as upg, npg or ift"
            )
        if tensor._version != version:
            raise RuntimeError(
                f"{self._strategy!r}: a tensor that the gradient of func needs, of shape "
                f"{tuple(tensor.shape)}, was changed in place since the forward pass, so that "
                "backward cannot evaluate func as it was. Change it after backward, or change a "
                "copy of it"
            )
        return tensor

    def _restart(self) -> None:
        """Go to the end of the iteration."""
        self._number = len(self._requires_grad) + 1
        self._saved.clear()
        self._pair = self._end

    def _step_back(self) -> None:
        """Undo the update before the current one. `_saved` then has the tensors of that one."""
        number, beta = self._number - 1, self._strategy.beta
        kept = self._kept.get(number) or self._pair
        assert kept is not None
        other, new = kept
        if number == 1:
            other = _Iterate(self._start, self._drift.true(0))
        inputs = [
            leaf.detach().requires_grad_(flag)
            for leaf, flag in zip(other.leaves, self._requires_grad[number - 1], strict=True)
        ]
        with torch.enable_grad(), self._autocast(), self._replay.again(number):
            image = self._evaluate(number, inputs)
        with torch.no_grad():
            # Not in place: `_unpack` compares versions with those of the forward pass.
            leaves = [
                torch.sub(leaf, beta * f.to(leaf.dtype)) / (1 - beta)
                for leaf, f in zip(new.leaves, image, strict=True)
            ]
        old = _Iterate(leaves, self._drift.repeat(number, other.sketch, new.sketch, leaves))
        self._pair = (old, other)
        if number == 1:
            self._check()

    def _check(self) -> None:
        """Warn where the gradient has lost more than `_TOLERANCE`; raise where it is not finite."""
        loss = self._drift.loss()
        if loss is None:
            return
        if not loss.finite:
            raise NonFiniteError(
                f"{self._strategy!r}: the iteration, or running it backwards, made a NaN or an "
                f"infinity, so there is no gradient. {_ADVICE}."
            )
        if loss.changed > _TOLERANCE:
            suspects = ", ".join(self._replay.suspects())
            warn_once(
                "reversible: func changed",
                f"{self._strategy!r}: func is not deterministic: evaluated in backward at the same "
                f"state as in the forward pass, it returned something else (by {loss.changed:.1e} "
                "of its norm), so the gradient is wrong. "
                + (f"Modules in it that draw or update: {suspects}. " if suspects else "")
                + "A variable that func reads may have been given another value since, as in "
                "x = deq(lambda h: f(h, x), h0). "
                "Draw dropout masks and noise once per solve, outside func, or take bptt. "
                "This warning is given once.",
                AssumptionWarning,
            )
        elif not loss.error <= _TOLERANCE:
            warn_once(
                "reversible",
                f"{self._strategy!r}: running the iteration backwards did not come back to the "
                "states of the forward pass, because it multiplies rounding errors. The gradient "
                f"is off by an estimated {loss.error:.1e} of its norm. {_ADVICE}. "
                "This warning is given once.",
                ConvergenceWarning,
            )


def _wide(leaf: Tensor) -> torch.dtype:
    """Return the dtype of y and z for a leaf of the state."""
    if leaf.device.type == "mps":  # which has no float64
        return leaf.dtype
    return torch.promote_types(leaf.dtype, torch.float64)
