"""Reversible: the gradient of an iteration that is run backwards instead of being stored."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..compilation import never_compiled
from ..errors import NonFiniteError, warn_once
from ..precision import AutocastState
from ..state import State, flatten, unflatten
from ..strategy import Context, GradStrategy
from .arguments import positive_int, relaxation

_TOLERANCE = 1e-2  # the relative error of the gradient above which a warning is given
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True, repr=False)
class Reversible(GradStrategy):
    """Backprop through a coupled iteration whose states backward recovers from the last two.

    McCallum, Arora & Foster 2025, "Reversible Deep Equilibrium Models" (arXiv:2509.12917). From
    y = z = the initial state, `steps` times

        y <- (1 - beta) y + beta F(z),    z <- (1 - beta) z + beta F(y),

    where each update can be solved for the old value. Owns the solve, as bptt does. The value is
    the last z and the gradient that of the iterates themselves, differentiable to any order.

    Costs 2 * steps evaluations of F and, in backward, as many again with their backward passes.
    Memory holds two states in float64, and one evaluation's graph at a time.

    F must do the same each time: dropout masks are fixed during a solve. Running backwards
    multiplies rounding errors by 1 / (1 - beta)^2 a step and more, which is why y and z are in
    float64 whatever F computes in. Relative error of the recovered start, and in brackets of the
    gradient, for relu(W h + u) with ||W||_2 = 0.9 on a 64 x 256 state:

        F        beta  5 steps          10 steps         20 steps         30 steps
        float32  0.5   0      (9e-08)   0      (1e-07)   0      (2e-07)   8e-05  (2e-07)
        float32  0.8   2e-13  (1e-07)   5e-10  (1e-07)   1e+02  (2e-07)   7e+09  (5e-05)
        float32  1.5   0      (3e-07)   0      (4e-07)   0      (5e-07)   7e-01  (4e-02)
        float64  0.5   4e-15  (3e-16)   4e-13  (2e-15)   3e-09  (1e-13)   3e-05  (1e-11)
        float64  0.8   2e-12  (4e-15)   1e-07  (1e-12)   3e+02  (2e-07)   6e+11  (4e-03)
        float64  1.5   4e-14  (8e-15)   2e-11  (3e-12)   2e-05  (2e-06)   9e+00  (6e-01)

    The gradient fares better since it fades on its way to the start. An estimated error of the
    gradient above 1e-2 warns once a run.

    Args:
        steps: the number of iterations.
        beta: the relaxation factor, in (0, 1) or (1, 2). The nearer to 1, the faster states are
            forgotten and the fewer steps can be undone.

    Raises:
        ValueError: if an argument is out of range.
    """

    owns_solve: ClassVar[bool] = True

    steps: int = 10
    beta: float = 0.8

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", positive_int("steps", self.steps))
        object.__setattr__(self, "beta", relaxation(self.beta))

    @property
    def tells_samples_apart(self) -> bool:
        """No."""
        return False

    def attach(self, func: Callable[[State], State], equilibrium: State, context: Context) -> State:
        """See `GradStrategy.attach`."""
        return deque(self.states(func, equilibrium, context), maxlen=1).pop()

    def states(
        self, func: Callable[[State], State], equilibrium: State, context: Context
    ) -> Iterator[State]:
        """Yield the iterates z_1 ... z_steps."""
        start = equilibrium if context.initial_state is None else context.initial_state
        tape = _Tape(self, func, start)
        y = z = tape.widened(start)
        for _ in range(self.steps):
            y = tape.update(y, z)
            z = tape.update(z, y)
            yield tape.narrowed(z)


class _Key(NamedTuple):
    """What is saved in a tensor's place.

    Attributes:
        number: of the evaluation.
        place: of the tensor among those of the evaluation.
        version: of the tensor then.
        address: of its memory.
    """

    number: int
    place: int
    version: int
    address: int


class _Saved(NamedTuple):
    """What autograd saves in an evaluation.

    Attributes:
        tensor: detached.
        is_parameter: whether it is one, or a view of one, whose memory is the same each time.
    """

    tensor: Tensor
    is_parameter: bool


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0


class _Tape:
    """What autograd saves along the iteration, made again when backward asks for it.

    Autograd builds the graph of all evaluations, so nothing need be known of what F captures; but
    where a node would save a tensor, it gets the number of one. Asked for a tensor of evaluation
    n, the tape runs the iteration back to there, which evaluates F once more.

    Args:
        strategy: whose iteration this is.
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
        # Held detached: graphs hold the tape, and must not hold themselves through it.
        self._start = [leaf.detach().to(_wide(leaf), copy=True) for leaf in leaves]
        self._end = (self._start, self._start)
        self._lock = threading.RLock()  # threads may go back through one graph at once
        self._restart()

    def widened(self, state: State) -> list[Tensor]:
        """Return the leaves of a state as y and z are held."""
        return [leaf.to(_wide(leaf), copy=True) for leaf in flatten(state)[0]]

    def narrowed(self, leaves: list[Tensor]) -> State:
        """Return y or z as a state of the dtypes it began with, in tensors of its own."""
        narrow = [
            leaf.to(dtype, copy=True) for leaf, dtype in zip(leaves, self._dtypes, strict=True)
        ]
        return unflatten(narrow, self._structure)

    @never_compiled
    def update(self, old: list[Tensor], other: list[Tensor]) -> list[Tensor]:
        """Return (1 - beta) old + beta F(other)."""
        self._requires_grad.append([leaf.requires_grad for leaf in other])
        image = self._evaluate(len(self._requires_grad), other)
        new = [
            torch.lerp(leaf, f.to(leaf.dtype), self._strategy.beta)
            for leaf, f in zip(old, image, strict=True)
        ]
        self._end = ([leaf.detach() for leaf in other], [leaf.detach() for leaf in new])
        self._restart()
        return new

    def _evaluate(self, number: int, leaves: list[Tensor]) -> list[Tensor]:
        """Return F's leaves; its saved tensors stay at hand until the tape moves on."""
        self._saved.clear()  # the graph holds `pack`, and through it the list
        self._number, self._saved = number, (saved := [])

        def pack(tensor: Tensor) -> _Key:
            base = tensor if tensor._base is None else tensor._base
            saved.append(_Saved(tensor.detach(), isinstance(base, torch.nn.Parameter)))
            return _Key(number, len(saved) - 1, tensor._version, _address(tensor))

        narrow = [leaf.to(dtype) for leaf, dtype in zip(leaves, self._dtypes, strict=True)]
        with saved_tensors_hooks(pack, self._unpack):
            return flatten(self._func(unflatten(narrow, self._structure)))[0]

    def _unpack(self, key: _Key) -> Tensor:
        with self._lock:
            return self._found(key)

    def _found(self, key: _Key) -> Tensor:
        number, place, version, address = key
        if number > self._number:  # a second backward pass
            self._restart()
        while number < self._number:
            self._step_back()
        if place >= len(self._saved):
            raise RuntimeError(
                f"{self._strategy!r}: func saved fewer tensors when evaluated again in backward; "
                "it must do the same each time"
            )
        tensor, is_parameter = self._saved[place]
        if is_parameter and _address(tensor) != address:
            raise RuntimeError(
                f"{self._strategy!r}: func uses other parameters in backward than in the forward "
                "pass; it must do the same each time. Under torch.func.functional_call take a "
                "strategy that evaluates it in the forward pass only"
            )
        if tensor._version != version:
            raise RuntimeError(
                f"{self._strategy!r}: a tensor that the gradient of func needs, of shape "
                f"{tuple(tensor.shape)}, was changed in place since the forward pass"
            )
        return tensor

    def _restart(self) -> None:
        """Go to the end of the iteration."""
        self._number = len(self._requires_grad) + 1
        self._saved.clear()
        self._other, self._new = self._end

    def _step_back(self) -> None:
        """Undo the update before, whose saved tensors are then at hand."""
        number, beta = self._number - 1, self._strategy.beta
        inputs = [
            leaf.detach().requires_grad_(flag)
            for leaf, flag in zip(self._other, self._requires_grad[number - 1], strict=True)
        ]
        with torch.enable_grad(), self._autocast():
            image = self._evaluate(number, inputs)
        with torch.no_grad():
            # Not in place: `_unpack` compares versions with those of the forward pass.
            old = [
                torch.sub(leaf, f, alpha=beta) / (1 - beta)
                for leaf, f in zip(self._new, image, strict=True)
            ]
        self._other, self._new = old, self._other
        if number == 1:
            self._check_start()

    def _check_start(self) -> None:
        """Compare what was recovered with where the iteration began.

        What reaches the start of a gradient has shrunk as the iteration's error did on the way
        from there, so errors of the start count by that much less.
        """
        y, z = self._end
        with torch.no_grad():
            lost = torch.maximum(
                _distance(self._other, self._start), _distance(self._new, self._start)
            )
            lost = lost / _distance(z, None).clamp(min=_TINY)
            shrunk = _distance(y, z) / _distance(z, self._start).clamp(min=_TINY)
            error = float(lost * shrunk)  # within a factor of 5 of the truth, or above it
        advice = "F must be deterministic; take fewer steps, or a beta nearer to 0.5"
        if not math.isfinite(error):
            raise NonFiniteError(
                f"{self._strategy!r}: the iteration, or running it backwards, made a NaN or an "
                f"infinity. {advice}."
            )
        if error > _TOLERANCE:
            warn_once(
                "reversible",
                f"{self._strategy!r}: running the iteration backwards missed the state it began "
                f"at, and the gradient by an estimated {error:.1e} of its norm. {advice}. "
                "This warning is given once.",
            )


def _distance(a: list[Tensor], b: list[Tensor] | None) -> Tensor:
    """Return the norm of a - b over all leaves; of a alone, if b is None."""
    differences = a if b is None else [x - y for x, y in zip(a, b, strict=True)]
    norms = [torch.linalg.vector_norm(x).to(a[0].device) for x in differences]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def _wide(leaf: Tensor) -> torch.dtype:
    """Return the dtype in which to hold y and z."""
    if leaf.device.type == "mps":  # which has no float64
        return leaf.dtype
    return torch.promote_types(leaf.dtype, torch.float64)
